"""Whether a response has the form that was asked for, and whether it is right. Shapes: N rollouts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nla_megatron.rewards.terms import Term, named_values, register
from nla_megatron.types import Measured


@dataclass(frozen=True)
class FormatOptions:
    """How the form is known."""

    value: str | None = None
    """A task's named value, such as `format`. None: 1 where the task found an answer in the form it asked for."""


@register("format")
class Format(Term):
    """1 where the response has the form that was asked for, 0 where it has not; or a task's own value of it.

    For `nla` the form is one explanation between its tags in a response that ended; for `math` one thinking block and
    then a boxed answer.
    """

    options: FormatOptions

    def needs(self) -> tuple[str, ...]:
        return () if self.options.value is None else (self.options.value,)

    def __call__(self, measured: Measured) -> Tensor:
        return well_formed(measured, self.options.value, self.name)


@dataclass(frozen=True)
class CorrectnessOptions:
    """Where the task says what is right."""

    value: str = "correct"
    """The task's named value."""


@register("correctness")
class Correctness(Term):
    """A task's own verdict on each response, 1 for right and 0 for wrong or unreadable."""

    options: CorrectnessOptions

    def needs(self) -> tuple[str, ...]:
        return (self.options.value,)

    def __call__(self, measured: Measured) -> Tensor:
        return named_values(measured, self.options.value, self.name)


def well_formed(measured: Measured, value: str | None, term: str) -> Tensor:
    """(N,) fp32: a task's named value, or 1 where there is an answer in the form that was asked for and 0 elsewhere."""
    return (~measured.failed).float() if value is None else named_values(measured, value, term)
