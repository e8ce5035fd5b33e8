"""How a strength changes over training steps or over the tokens of a response: plain numbers, known beforehand."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nla_megatron.errors import ConfigError

KINDS = ("constant", "linear", "cosine")
AXES = ("training", "decode")


@dataclass(frozen=True)
class Schedule:
    """A factor on an intervention's strength.

    `constant` is `start` at every step. `linear` and `cosine` lead from `start` at step 0 to `end` at step `steps`,
    and stay there.

    Args:
        kind: one of `KINDS`.
        over: "training": the trainer's step; "decode": how many tokens of the response come before this one, 0 for
            the prompt and for the response's first token.
        start, end: factors; `end` counts only where the kind is not constant.
        steps: at least 1 where the kind is not constant.

    Raises:
        ConfigError: an unknown kind or axis, a factor that is not finite, or no steps.

    Example:
        >>> Schedule("linear", "decode", start=1.0, end=0.0, steps=4).factor(1)
        0.75
    """

    kind: str = "constant"
    over: str = "training"
    start: float = 1.0
    end: float = 1.0
    steps: int = 0

    def __post_init__(self) -> None:
        _one_of("schedule.kind", self.kind, KINDS)
        _one_of("schedule.over", self.over, AXES)
        for name, value in (("start", self.start), ("end", self.end)):
            if not math.isfinite(value):
                raise ConfigError(f"schedule.{name}={value}", "a finite factor", f"set schedule.{name}")
        if self.kind != "constant" and self.steps < 1:
            raise ConfigError(
                f"schedule.steps={self.steps} of a {self.kind} schedule", "at least 1 step", "set schedule.steps"
            )

    def factor(self, step: int) -> float:
        """The factor at a step, 0-based."""
        if self.kind == "constant":
            return self.start
        done = min(max(step, 0), self.steps) / self.steps
        if self.kind == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done

    def factors(self) -> tuple[float, ...]:
        """The factors of steps 0, 1, …; the last one holds for every later step.

        For decode steps this is the table that both sides index, so that they multiply by the same numbers.
        """
        return tuple(self.factor(step) for step in range(1 if self.kind == "constant" else self.steps + 1))


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{key}={value!r}", f"one of {', '.join(allowed)}", f"set {key}")
