"""How terms become a reward: weights that may change once during training, and the formula that puts them together.

Shapes: N rollouts. With r the terms by their labels and w their weights at the step,
    additive                 Σ w·r
    weighted_length_penalty  w_c·r_c + w_ℓ·r_c·r_ℓ[·r_f] + Σ w·r of the others
c, ℓ and f are the labels `correctness`, `length` and `format`: a response that is wrong gains nothing by being short.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from nla_megatron.config.schema import RewardConfig, RewardTermConfig
from nla_megatron.errors import ConfigError
from nla_megatron.rewards.terms import Term, checked
from nla_megatron.types import Measured, Scores

CORRECTNESS, LENGTH, FORMAT = "correctness", "length", "format"


def here(compute: Callable[[], Scores]) -> Scores:
    """Computes on the rank that asks; right where there is one."""
    return compute()


class Composed:
    """A `Reward`. `Scores.terms` holds each term as it is before its weight, and its parts as `label/part`."""

    def __init__(
        self,
        config: RewardConfig,
        terms: Mapping[str, Term],
        steps_per_epoch: float | None = None,
        once: Callable[[Callable[[], Scores]], Scores] = here,
    ):
        self.config, self.terms = config, dict(terms)
        self.steps_per_epoch, self.once = steps_per_epoch, once
        self._check_labels()
        for label, part in config.parts.items():
            if part.changes and part.change_by == "epoch" and steps_per_epoch is None:
                raise ConfigError(
                    f"reward.terms.{label}.change_by=epoch", "a task whose rows are passed over", "count in steps"
                )

    def __call__(self, measured: Measured, step: int) -> Scores:
        looked = self.look(measured)
        scores = self.scores(looked, measured, step)
        self.settle(looked)
        return scores

    def look(self, measured: Measured) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for label, term in self.terms.items():
            scores = self._looked(label, term, measured)
            found |= {label: scores.rewards, **{f"{label}/{name}": part for name, part in scores.terms.items()}}
        return found

    def scores(
        self, looked: Mapping[str, Tensor], measured: Measured, step: int, among: Mapping[str, Tensor] | None = None
    ) -> Scores:
        among = looked if among is None else among
        values = {
            label: checked(term.among(looked[label], among[label]), measured, label)
            for label, term in self.terms.items()
        }
        rewards = self._combine(values, self.weights(step))
        if self.config.strict_format_gate:
            rewards = torch.where(values[FORMAT] > 0, rewards, self.config.non_strict_penalty)
        return Scores(checked(rewards, measured, self.config.composition), {**looked, **values})

    def settle(self, looked: Mapping[str, Tensor]) -> None:
        for label, term in self.terms.items():
            term.settle(looked[label])

    def weights(self, step: int) -> dict[str, float]:
        """Of each term at a step."""
        return {label: self._weight(part, step) for label, part in self.config.parts.items()}

    @property
    def needs(self) -> dict[str, tuple[str, ...]]:
        """The named values of a task that each term reads."""
        return {label: term.needs() for label, term in self.terms.items()}

    def check_needs(self, measured: Collection[str], task: str) -> None:
        """Raises ConfigError where a term reads what the task does not measure."""
        for label, names in self.needs.items():
            if missing := sorted(set(names) - set(measured)):
                raise ConfigError(
                    f"reward term {label!r} reads {', '.join(missing)}, which task={task} does not measure",
                    f"a term that reads some of {', '.join(measured)}",
                    "choose another reward=, or another task=",
                )

    def state(self) -> dict[str, float]:
        return {f"{label}/{key}": value for label, term in self.terms.items() for key, value in term.state().items()}

    def load_state(self, state: dict[str, float]) -> None:
        for label, term in self.terms.items():
            start = f"{label}/"
            term.load_state({key.removeprefix(start): value for key, value in state.items() if key.startswith(start)})

    def _looked(self, label: str, term: Term, measured: Measured) -> Scores:
        def compute() -> Scores:
            found = term(measured)
            scores = found if isinstance(found, Scores) else Scores(found)
            parts = {name: checked(part, measured, f"{label}/{name}") for name, part in scores.terms.items()}
            return Scores(checked(scores.rewards, measured, label), parts)

        return self.once(compute) if term.once else compute()

    def _weight(self, part: RewardTermConfig, step: int) -> float:
        if part.later_weight is None or part.change_at is None:
            return part.weight
        at = step
        if part.change_by == "epoch":
            assert self.steps_per_epoch is not None
            at = int(step / self.steps_per_epoch + 1e-9)  # a step that starts an epoch belongs to it despite rounding
        return part.later_weight if at >= part.change_at else part.weight

    def _combine(self, values: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
        total = torch.zeros_like(next(iter(values.values())), dtype=torch.float64)
        for label, value in values.items():
            factor = value.double()
            if self.config.composition == "weighted_length_penalty" and label == LENGTH:
                factor = factor * values[CORRECTNESS]
                if self.config.product == "correctness_length_format":
                    factor = factor * values[FORMAT]
            total += weights[label] * factor
        return total.float()

    def _check_labels(self) -> None:
        """Raises ConfigError where a composition or the gate names a term that is not there."""
        needed = set()
        if self.config.composition == "weighted_length_penalty":
            needed |= {CORRECTNESS, LENGTH}
            if self.config.product == "correctness_length_format":
                needed.add(FORMAT)
        if self.config.strict_format_gate:
            needed.add(FORMAT)
        absent = sorted(needed - set(self.terms))
        if absent or not self.terms:
            raise ConfigError(
                f"reward.terms has {', '.join(self.terms) or 'nothing'}",
                f"{', '.join(absent) or 'at least one term'} too",
                f"add {' '.join(f'+reward.terms.{label}.term=...' for label in absent or ['NAME'])}",
            )
