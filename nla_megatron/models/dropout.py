"""Dropout as a function of keys: no layout, no resume and no recomputation changes what is dropped."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nla_megatron.interventions.projection import Drop
from nla_megatron.types import Injection


def dropped(values_NW: Tensor, share: float, keys: Sequence[tuple[int, ...]]) -> Tensor:
    """Each number is 0 with probability `share`, and is divided by 1 - share otherwise; row n goes by `keys[n]`."""
    keep = 1 - share
    draws_NW = torch.stack([_draws(key, values_NW.shape[1]) for key in keys])
    return values_NW * (draws_NW < keep).to(values_NW) / keep


@dataclass(frozen=True)
class ProjectionDropout:
    """`share` of what leaves a projection's layer, a function of (seed, step, row, intervention, vector, layer)."""

    share: float
    seed: int

    def of(self, number: int, vectors: int, injection: Injection) -> Drop | None:
        """Of one intervention on the vectors of a microbatch."""
        if not self.share:
            return None
        step = injection.training_step
        keys = [(self.seed, step, row, number, at) for row in injection.rows for at in range(vectors)]
        return lambda values, layer: dropped(values, self.share, [(*key, layer) for key in keys])


def _draws(key: tuple[int, ...], width: int) -> Tensor:
    """Uniform numbers (W,) that depend on the key alone; drawn on the CPU, which every device agrees with."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.rand(width, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")))
