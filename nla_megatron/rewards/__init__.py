"""Rewards: from what a task measured of each rollout to one number per rollout. Pure torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from nla_megatron.config.schema import RewardConfig
from nla_megatron.rewards.composition import Composed, here
from nla_megatron.rewards.terms import Term, make_term, register
from nla_megatron.types import Measured, Scores

__all__ = ["Reward", "Term", "make_reward", "register"]


class Reward(Protocol):
    """From a step's measurements to rewards; `step` is the trainer's, 0-based, for schedules.

    A step may measure more rollouts than it learns from: prompts that are replaced, greedy responses. `look` is for all
    of them, `scores` looks at them beside those that count, and `settle` is told those that count, once a step. Called,
    it is all three, where a step has one set of rollouts. `state` and `load_state`: what must survive a resume, such as
    a moving average; numbers alone.
    """

    def __call__(self, measured: Measured, step: int) -> Scores: ...

    def look(self, measured: Measured) -> dict[str, Tensor]:
        """Each term of each rollout by itself, and their parts as `label/part`, (N,); asks whom it has to ask."""

    def scores(
        self, looked: Mapping[str, Tensor], measured: Measured, step: int, among: Mapping[str, Tensor] | None = None
    ) -> Scores:
        """Rewards of what was looked at; `among`: what was seen of the rollouts that the step learns from, if of others
        than these."""

    def settle(self, looked: Mapping[str, Tensor]) -> None:
        """A step is over that learned from these: moving averages move."""

    def state(self) -> dict[str, float]: ...

    def load_state(self, state: dict[str, float]) -> None: ...


def make_reward(
    config: RewardConfig,
    steps_per_epoch: float | None = None,
    rows: int | None = None,
    once: Callable[[Callable[[], Scores]], Scores] = here,
) -> Composed:
    """The reward that a configuration describes.

    Args:
        config: its terms and how they are put together.
        steps_per_epoch: rows of the table over rows of a step, for weights that change by epoch.
        rows: of the task's table, for terms that know something of each row.
        once: runs a computation on one rank and gives its result to all; terms that ask a server go through it.

    Raises:
        ConfigError: an unknown term or option, an import path that does not resolve, or parts that do not fit.
        MissingFile: a file that a term reads.
    """
    terms = {
        label: make_term(one.term or label, one.options, f"reward.terms.{label}") for label, one in config.parts.items()
    }
    if rows is not None:
        for term in terms.values():
            term.check_rows(rows)
    return Composed(config, terms, steps_per_epoch, once)
