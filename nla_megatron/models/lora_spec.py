"""What an adapter is, without a tensor: which projections, how strongly, and where they lie in Megatron's layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nla_megatron.errors import ConfigError

LORA = "lora"
"""What an adapted layer calls its adapters; part of their names in checkpoints."""
ALL_LINEAR = "all-linear"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS = ATTENTION + FEED_FORWARD


@dataclass(frozen=True)
class LoraSpec:
    """Which projections are adapted, and how strongly: a pair adds scale * B A to its weight; there is no dropout.

    Args:
        rank, alpha: of every projection that `ranks` and `alphas` do not name.
        targets: names among `PROJECTIONS`; see `targets_of`.
        rslora: the scale is alpha / sqrt(rank) in place of alpha / rank (Kalajdzievski, 2023).

    Raises:
        ConfigError: an unknown projection, a rank below 1, or an alpha that is not a positive number.

    Example:
        >>> LoraSpec(rank=128, alpha=16, rslora=True).scale_of("q_proj")
        1.4142135623730951
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = PROJECTIONS
    rslora: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = sorted({*self.targets, *self.ranks, *self.alphas} - set(PROJECTIONS))
        if unknown or not self.targets:
            found = f"LoRA target {unknown[0]!r}" if unknown else "no LoRA target"
            raise ConfigError(found, f"some of {', '.join(PROJECTIONS)}", f"name projections, or {ALL_LINEAR}")
        for name in self.targets:
            if self.rank_of(name) < 1 or not 0 < self.alpha_of(name) < math.inf:
                raise ConfigError(
                    f"LoRA of rank {self.rank_of(name)} and alpha {self.alpha_of(name)} for {name}",
                    "a rank of at least 1 and a positive alpha",
                    "raise them, or leave the projection out",
                )

    def rank_of(self, projection: str) -> int:
        return self.ranks.get(projection, self.rank)

    def alpha_of(self, projection: str) -> float:
        return self.alphas.get(projection, self.alpha)

    def scale_of(self, projection: str) -> float:
        return scale(self.rank_of(projection), self.alpha_of(projection), self.rslora)


def scale(rank: int, alpha: float, rslora: bool) -> float:
    """What B A is multiplied by."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def targets_of(value: str | Sequence[str]) -> tuple[str, ...]:
    """The projections that `all-linear`, one name, or several names mean, in the order of `PROJECTIONS`."""
    if value == ALL_LINEAR:
        return PROJECTIONS
    names = [value] if isinstance(value, str) else list(value)
    known = [name for name in PROJECTIONS if name in names]
    return tuple(known + [name for name in names if name not in known])


@dataclass(frozen=True)
class Slot:
    """One projection inside a fused layer.

    `hf` is its module's name there (`model.layers.0.self_attn.q_proj`), `view` this TP rank's part of its weight in
    the fused layer's view, inputs last.
    """

    projection: str
    hf: str
    view: tuple[int, ...]


@dataclass(frozen=True)
class FusedLinear:
    """A Megatron linear layer and the projections it is made of.

    Args:
        name: the module's, blocks numbered over the whole pipeline.
        slots: the projections in the layer's order, adapted or not.
        axis: the axis of the view along which they lie; None for a single one.
        inputs_cut: tensor parallelism cuts the inputs in place of the outputs.
    """

    name: str
    slots: tuple[Slot, ...]
    axis: int | None
    inputs_cut: bool
