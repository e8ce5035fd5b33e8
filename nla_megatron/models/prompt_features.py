"""What a strength predictor reads of prompts, and the strengths that it makes of them.

Legend: N prompts, P different ones among them, S strengths, D hidden.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nla_megatron.models.batching import Batch
from nla_megatron.models.pipeline import forward_rows
from nla_megatron.models.strength import StrengthPredictor, pooled, states_only
from nla_megatron.parallel.world import World

Ids = tuple[int, ...]

_CACHE_BYTES = 256 * 2**20  # per rank; 16,384 prompts of a model 4,096 wide


class PromptFeatures:
    """What the predictor reads of a prompt: (D,) fp32 of the unsteered model, kept because that model never changes."""

    def __init__(self, chunks: Sequence[Any], world: World, micro_batch_size: int):
        self.chunks, self.world, self.micro_batch_size = list(chunks), world, micro_batch_size
        self.width = int(self.chunks[0].shape.hidden_size)
        self._kept: OrderedDict[Ids, Tensor] = OrderedDict()

    def __call__(self, prompts: Sequence[Ids]) -> Tensor:
        """(P, D) on the CPU, the same on every rank; collective, so every rank asks for the same."""
        missing = list(dict.fromkeys(prompt for prompt in prompts if prompt not in self._kept))
        if missing:
            with states_only(self.chunks):
                found = forward_rows(
                    self.chunks, Batch(missing), self.world, self.micro_batch_size, pooled(self.world), self.width
                )
            self._kept.update(zip(missing, found, strict=True))
        for prompt in prompts:
            self._kept.move_to_end(prompt)
        features = torch.stack([self._kept[prompt] for prompt in prompts])
        while len(self._kept) * self.width * 4 > _CACHE_BYTES:
            self._kept.popitem(last=False)
        return features


def predicted(
    predictor: StrengthPredictor, features: PromptFeatures, prompts: Sequence[Ids],
    seed_of: Callable[[Ids], int] | None = None,
) -> Tensor:  # fmt: skip
    """(N, S) on the device, each different prompt computed once; `seed_of` is of its dropout, None for none."""
    device = features.world.device
    different = list(dict.fromkeys(prompts))
    index = {prompt: number for number, prompt in enumerate(different)}
    seeds = None if seed_of is None else [seed_of(prompt) for prompt in different]
    values_PS: Tensor = predictor(features(different).to(device), seeds)
    return values_PS[torch.tensor([index[prompt] for prompt in prompts], device=device)]
