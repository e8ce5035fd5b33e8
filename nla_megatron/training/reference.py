"""The policy that a KL term compares with: as this stage started from it, or a moving average of it since."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nla_megatron.config.schema import AlgorithmConfig
from nla_megatron.models.builder import chunks_of
from nla_megatron.training.module import sharded_weights, take_weights


class FrozenCopy:
    """A model's weights as they were, kept on the CPU: the KL reference costs no device memory."""

    def __init__(self, model: Any):
        self.chunks = chunks_of(model)
        self.parameters = [parameter for chunk in self.chunks for parameter in chunk.parameters()]
        self.kept = [parameter.detach().to("cpu", copy=True) for parameter in self.parameters]

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """Inside, the model computes with the kept weights; afterwards with its own, to the bit."""
        own = [parameter.detach().clone() for parameter in self.parameters]
        self._fill(self.kept)
        try:
            yield
        finally:
            self._fill(own)

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
        """After an update of the policy."""
        for kept, parameter in zip(self.kept, self.parameters, strict=True):
            kept.lerp_(parameter.detach().to("cpu", torch.float32), 1 - self.decay)

    def state(self, loading: bool) -> dict[str, Any]:
        """The sharded average under the model's names, for `dist_checkpointing`."""
        from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace

        with self._standing_in():
            # The entries hold parameters, which are the model's own again by the time they are written.
            return dict_list_map_inplace(_detached, sharded_weights(self.chunks))

    def load_state(self, loaded: dict[str, Any]) -> None:
        with self._standing_in():
            take_weights(self.chunks, loaded)

    @contextmanager
    def _standing_in(self) -> Iterator[None]:
        """Inside, the model's parameters are the average itself, and what is loaded goes into it."""
        own = [parameter.data for parameter in self.parameters]
        self._stand_in(self.kept)
        try:
            yield
        finally:
            self._stand_in(own)

    def _stand_in(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.data = value


def _detached(entry: Any) -> Any:
    if isinstance(getattr(entry, "data", None), Tensor):
        entry.data = entry.data.detach()
    return entry


def make_reference(model: Any, config: AlgorithmConfig, needed: bool) -> FrozenCopy | MovingCopy | None:
    """To be made before a checkpoint is loaded: the reference is the policy that the stage starts from."""
    if not needed:
        return None
    return MovingCopy(model, config.reference_decay) if config.reference == "ema" else FrozenCopy(model)
