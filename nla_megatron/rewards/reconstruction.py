"""The NLA reward: how well the AR rebuilds the activation from the text (docs/method.md).

Shapes: N rollouts, M rollouts that a step learns from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nla_megatron import geometry
from nla_megatron.errors import ConfigError
from nla_megatron.rewards.terms import Term, named_values, register
from nla_megatron.types import Measured

_MIN_STD = 1e-6  # rewards that are all alike are 0 after normalisation, not rounding errors of any size


@dataclass(frozen=True)
class ReconstructionOptions:
    """From an error to a reward, in the order in which they apply."""

    mse_reduction: str = "mean"
    """Over the D numbers of an activation; `sum` is D times the mean, and needs a task that measures `d_model`."""
    transform: str = "negative"
    """`negative`: -MSE. `log`: -log MSE. `exp`: exp(-T MSE). `bounded`: 1/(1+MSE)."""
    temperature: float = 1.0
    """T of `exp`."""
    scale: float = 1.0
    """The transformed error is multiplied by it."""
    batch_normalise: bool = False
    """Mean 0 and standard deviation 1 over the rollouts of the step."""
    ema_beta: float | None = None
    """A moving average of the steps' mean rewards is taken off; this share of it stays at each step. None: no such."""
    clip_low: float | None = None
    """Rewards below it become it."""
    clip_high: float | None = None
    """Rewards above it become it."""

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("mse_reduction", self.mse_reduction, ("mean", "sum")),
            ("transform", self.transform, ("negative", "log", "exp", "bounded")),
        ):
            if value not in choices:
                raise ConfigError(f"{name}={value!r}", f"one of {', '.join(choices)}", f"set {name} to one of these")
        if self.ema_beta is not None and not 0 <= self.ema_beta < 1:
            raise ConfigError(f"ema_beta={self.ema_beta}", "at least 0 and below 1", "lower it")
        if self.ema_beta is not None and self.batch_normalise:
            raise ConfigError("batch_normalise with ema_beta", "one of them", "normalised rewards have mean 0 already")
        if self.clip_low is not None and self.clip_high is not None and not self.clip_low < self.clip_high:
            raise ConfigError(f"clip_low={self.clip_low} with clip_high={self.clip_high}", "low < high", "swap them")


@register("reconstruction")
class Reconstruction(Term):
    """The transformed error; a response without an explanation gets what an orthogonal prediction would.

    A rollout's error is the task's `mse`. The moving average is taken off before it moves: the first step is its own
    average, and b' = beta·b + (1 - beta)·mean after each later one.
    """

    options: ReconstructionOptions

    def __init__(self, options: ReconstructionOptions):
        super().__init__(options)
        self._average: float | None = None

    def needs(self) -> tuple[str, ...]:
        return ("mse", "d_model") if self.options.mse_reduction == "sum" else ("mse",)

    def __call__(self, measured: Measured) -> Tensor:
        options, failed_N = self.options, measured.failed
        mse_N = named_values(measured, "mse", self.name).masked_fill(failed_N, geometry.ORTHOGONAL_MSE)
        if options.mse_reduction == "sum":
            mse_N = mse_N * named_values(measured, "d_model", self.name)
        return options.scale * geometry.reward(mse_N, options.transform, options.temperature)

    def among(self, rewards_N: Tensor, step_M: Tensor) -> Tensor:
        options = self.options
        if options.batch_normalise:
            spread = step_M.std(correction=0)
            rewards_N = (rewards_N - step_M.mean()) / spread if spread > _MIN_STD else torch.zeros_like(rewards_N)
        elif options.ema_beta is not None:
            rewards_N = rewards_N - self._before(step_M)
        return rewards_N.clamp(options.clip_low, options.clip_high) if self._clips else rewards_N

    def settle(self, step_M: Tensor) -> None:
        if self.options.ema_beta is not None:
            beta, mean = self.options.ema_beta, float(step_M.double().mean())
            self._average = beta * self._before(step_M) + (1 - beta) * mean

    def state(self) -> dict[str, float]:
        return {} if self._average is None else {"average": self._average}

    def load_state(self, state: dict[str, float]) -> None:
        self._average = state.get("average")

    @property
    def _clips(self) -> bool:
        return self.options.clip_low is not None or self.options.clip_high is not None

    def _before(self, step_M: Tensor) -> float:
        """The average of the steps before; the first step's own."""
        return float(step_M.double().mean()) if self._average is None else self._average
