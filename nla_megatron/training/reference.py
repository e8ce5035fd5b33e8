"""The policy that a KL term compares with: as this stage started from it, or a moving average of it since."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from nla_megatron.config.schema import AlgorithmConfig
from nla_megatron.models.builder import chunks_of
from nla_megatron.training.module import sharded_weights, take_weights


class Reference(Protocol):
    """What a policy's log-probs are compared with."""

    def in_place(self) -> AbstractContextManager[None]:
        """Inside, the policy computes as the reference; afterwards as itself, to the bit."""

    def follow(self) -> None:
        """After the updates of a step."""


class FrozenCopy:
    """What learns of a model as it was, kept on the CPU: the KL reference costs no device memory."""

    def __init__(self, model: Any):
        self.chunks = chunks_of(model)
        self.parameters = [one for chunk in self.chunks for one in chunk.parameters() if one.requires_grad]
        self.kept = [parameter.detach().to("cpu", copy=True) for parameter in self.parameters]

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        own = [parameter.detach().clone() for parameter in self.parameters]
        self._fill(self.kept)
        try:
            yield
        finally:
            self._fill(own)

    def follow(self) -> None:
        """It stays where it is."""

    @torch.no_grad()
    def _fill(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)


class MovingCopy(FrozenCopy):
    """An exponential moving average of the policy, fp32: rounded to bf16, a decay of 0.999 would not move it at all.

    `decay` in [0, 1) is how much of the average an update leaves. It is part of a checkpoint.
    """

    def __init__(self, model: Any, decay: float):
        super().__init__(model)
        self.decay, self.kept = decay, [value.float() for value in self.kept]

    @torch.no_grad()
    def follow(self) -> None:
        for kept, parameter in zip(self.kept, self.parameters, strict=True):
            kept.lerp_(parameter.detach().to("cpu", torch.float32), 1 - self.decay)

    def state(self, loading: bool) -> dict[str, Any]:
        """The sharded average under the model's names, for `dist_checkpointing`."""
        with self._standing_in():
            return sharded_weights(self.chunks)

    def load_state(self, loaded: dict[str, Any]) -> None:
        with self._standing_in():
            take_weights(self.chunks, loaded)

    @contextmanager
    def _standing_in(self) -> Iterator[None]:
        """Inside, the modules hold the average in place of their parameters, and what is loaded goes into it.

        The parameters stay as they are: one whose data were of another type or device for a moment would lose the hook
        by which Megatron collects its gradients.
        """
        pairs = zip(self.parameters, self.kept, strict=True)
        average = {id(parameter): torch.nn.Parameter(kept) for parameter, kept in pairs}
        modules = [module for chunk in self.chunks for module in chunk.modules()]
        own = [
            (module, name, held)
            for module in modules
            for name, held in module.named_parameters(recurse=False)
            if id(held) in average
        ]
        for module, name, held in own:
            setattr(module, name, average[id(held)])
        try:
            yield
        finally:
            for module, name, held in own:
                setattr(module, name, held)


def copied(model: Any, config: AlgorithmConfig) -> FrozenCopy:
    """The reference of a model whose parameters learn, as `config.reference` says."""
    return MovingCopy(model, config.reference_decay) if config.reference == "ema" else FrozenCopy(model)
