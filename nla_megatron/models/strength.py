"""Who chooses how strongly to steer: from what a frozen model makes of a prompt to one strength per steered feature.

Legend: N prompts, B rows of a microbatch, T tokens, D hidden, S strengths of all interventions side by side.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nla_megatron.errors import ConfigError, WidthError
from nla_megatron.models.builder import chunks_of

if TYPE_CHECKING:
    from nla_megatron.interventions.spec import Intervention
    from nla_megatron.parallel.world import World
    from nla_megatron.types import Microbatch

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}


@dataclass(frozen=True)
class PredictorConfig:
    """A strength predictor.

    Args:
        hidden: width between the layers.
        layers: linear layers; 1 has nothing between input and strengths.
        dropout: of what is between the layers, in training.
        activation: one of `ACTIVATIONS`.
        least, most: the open interval of strengths, before `scale`.
        scale: what they are multiplied by.
        initial: strength that the last layer's bias alone gives, before any training; None leaves it near the middle.

    Raises:
        ConfigError: a number that cannot be meant, an unknown activation, or an interval that is none.
    """

    hidden: int = 1024
    layers: int = 2
    dropout: float = 0.1
    activation: str = "relu"
    least: float = -5.0
    most: float = 5.0
    scale: float = 1.0
    initial: float | None = None

    def __post_init__(self) -> None:
        if self.hidden < 1 or self.layers < 1:
            raise ConfigError(
                f"a predictor of {self.layers} layers, {self.hidden} wide", "1 or more of both", "set layers and hidden"
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout} of the predictor", "0 or more, below 1", "set dropout")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(
                f"activation={self.activation!r} of the predictor", f"one of {', '.join(ACTIVATIONS)}", "set activation"
            )
        if not (math.isfinite(self.least) and math.isfinite(self.most) and self.least < self.most):
            raise ConfigError(
                f"strengths from {self.least} to {self.most}", "two numbers, the least below the most",
                "set strength_min and strength_max",
            )  # fmt: skip
        if not (math.isfinite(self.scale) and self.scale != 0):
            raise ConfigError(f"strength_scale={self.scale}", "a finite number, not 0", "set strength_scale")
        if self.initial is not None and not self.least < self.initial / self.scale < self.most:
            low, high = sorted((self.least * self.scale, self.most * self.scale))
            raise ConfigError(
                f"initial_strength={self.initial}", f"between {low:g} and {high:g}", "set initial_strength"
            )


class StrengthPredictor(nn.Module):
    """(N, D) -> (N, S) fp32: scale · (tanh(x)(max - min)/2 + (max + min)/2), x what an MLP makes of the features.

    Seeded: the same weights on every rank. Dropout is drawn for each row from a seed of its own, so that neither the
    batch nor the layout that a row comes with changes its strengths.
    """

    def __init__(self, width: int, strengths: int, config: PredictorConfig, seed: int = 0):
        super().__init__()
        self.width, self.strengths, self.config = width, strengths, config
        sizes = [width, *[config.hidden] * (config.layers - 1), strengths]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.linears = nn.ModuleList(nn.Linear(*pair) for pair in zip(sizes, sizes[1:], strict=False))
        self.activation = ACTIVATIONS[config.activation]()
        if config.initial is not None:
            half, middle = (config.most - config.least) / 2, (config.most + config.least) / 2
            with torch.no_grad():
                bias = self.linears[-1].bias
                assert isinstance(bias, Tensor)
                bias.fill_(math.atanh((config.initial / config.scale - middle) / half))

    def forward(self, features_ND: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        """Strengths (N, S); `seeds`, one per row, are of the dropout, None for none.

        Raises:
            WidthError: features of another width.
        """
        if features_ND.shape[-1] != self.width:
            raise WidthError(
                f"features {features_ND.shape[-1]} wide for a strength predictor", f"{self.width}",
                "use the predictor that was trained with this model",
            )  # fmt: skip
        hidden = features_ND.float()
        for number, linear in enumerate(self.linears):
            hidden = linear(hidden)
            if number + 1 < len(self.linears):
                hidden = self._dropped(self.activation(hidden), seeds, number)
        half, middle = (self.config.most - self.config.least) / 2, (self.config.most + self.config.least) / 2
        return self.config.scale * (hidden.tanh() * half + middle)

    def _dropped(self, hidden_NH: Tensor, seeds: Sequence[int] | None, layer: int) -> Tensor:
        if seeds is None or not self.config.dropout:
            return hidden_NH
        kept = [
            torch.rand(hidden_NH.shape[1], generator=torch.Generator().manual_seed(seed + layer)) >= self.config.dropout
            for seed in seeds
        ]
        return hidden_NH * torch.stack(kept).to(hidden_NH) / (1 - self.config.dropout)


def dropout_seed(seed: int, step: int, prompt_ids: Sequence[int]) -> int:
    """Of one prompt's dropout at one step: a function of both and of the run's seed alone."""
    digest = hashlib.sha256(f"strengths:{seed}:{step}:{list(prompt_ids)}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def columns_of(interventions: Sequence[Intervention]) -> tuple[tuple[int, int] | None, ...]:
    """Which of the predictor's S strengths are each intervention's; None for those that take vectors.

    Example:
        >>> columns_of([Intervention(0, "global", sae="s"), Intervention(1, "clamp", sae="s", features=(4, 7))])
        ((0, 1), (1, 3))
    """
    columns: list[tuple[int, int] | None] = []
    first = 0
    for each in interventions:
        count = 0 if each.takes_vectors else each.num_strengths
        columns.append((first, first + count) if count else None)
        first += count
    return tuple(columns)


def pooled(world: World) -> Any:
    """A collector of a prompt's features: the mean over its tokens of the states behind the final norm, (B, D) fp32.

    For models inside `states_only`. Sequence parallelism shares tokens out; here they come together again.
    """
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    def collect(states_TBD: Tensor, part: Microbatch) -> Tensor:
        whole_TBD = gather_from_sequence_parallel_region(states_TBD) if world.sequence_parallel else states_TBD
        at_T1 = torch.arange(whole_TBD.shape[0], device=whole_TBD.device)[:, None]
        mask_TB1 = (at_T1 < part.lengths)[..., None]
        summed_BD = torch.where(mask_TB1, whole_TBD.float(), 0.0).sum(0)
        return summed_BD / part.lengths[:, None]

    return collect


@contextmanager
def states_only(model: Any) -> Iterator[None]:
    """Inside, a language model puts out the states behind its final norm, (T, B, D), in place of logits."""
    ends = [chunk for chunk in chunks_of(model) if chunk.post_process]
    for chunk in ends:
        chunk.post_process = False
    try:
        yield
    finally:
        for chunk in ends:
            chunk.post_process = True
