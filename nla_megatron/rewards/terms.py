"""Terms of a reward: each reads what a task measured and gives one number per rollout.

Shapes: N rollouts, M rollouts that a step learns from.

A term is a class with `@register(name)` and a frozen dataclass of options, or a class or function of the user's own,
named by its import path.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor

from nla_megatron.config.options import bind, is_import_path, resolve
from nla_megatron.config.registry import Registry
from nla_megatron.errors import ConfigError, RewardError
from nla_megatron.types import Measured, Scores


@dataclass(frozen=True)
class NoOptions:
    """Of a term that has none."""


class Term:
    """One part of a reward. A subclass annotates `options` with its own dataclass, whose fields are its options.

    The same measurements give the same numbers on every rank, so that nobody needs to exchange them.
    """

    name: str = ""
    once: bool = False
    """Computed on one rank, whose result the others are told: it asks a server, or is not deterministic."""
    options: Any = NoOptions()

    def __init__(self, options: Any):
        self.options = options

    def __call__(self, measured: Measured) -> Tensor | Scores:
        """Rewards (N,), before any weight; as `Scores` where parts of it are worth a look in the logs.

        It may be called several times in a step, of which some rollouts are thrown away: what it carries from step to
        step changes in `settle` alone.
        """
        raise NotImplementedError

    def among(self, rewards_N: Tensor, step_M: Tensor) -> Tensor:
        """What `rewards_N` become beside `step_M`, the same term of all rollouts that the step learns from."""
        return rewards_N

    def settle(self, step_M: Tensor) -> None:
        """Once a step, with this term of the rollouts that it learned from: for what is carried to the next one."""

    def needs(self) -> tuple[str, ...]:
        """Which of a task's named values it reads."""
        return ()

    def check_rows(self, count: int) -> None:
        """Raises where it cannot serve a table of `count` rows."""

    def state(self) -> dict[str, float]:
        return {}

    def load_state(self, state: dict[str, float]) -> None:
        pass


T = TypeVar("T", bound=Term)
_TERMS: Registry[type[Term]] = Registry("reward term", named=True)


def register(name: str) -> Callable[[type[T]], type[T]]:
    """A class decorator that makes a term known by name.

    Raises:
        ConfigError: another term has that name, or the class says nothing of its options.
    """

    def add(cls: type[T]) -> type[T]:
        options_type(cls)
        return _TERMS.register(name)(cls)

    return add


def registered() -> Mapping[str, type[Term]]:
    """Every term that comes with the package, by name."""
    # Inside, because these modules import the names above.
    from nla_megatron.rewards import judge, length, lexical, outcome, reconstruction, utilisation  # noqa: F401

    return _TERMS


def options_type(cls: type[Term]) -> type:
    """The dataclass of a term's options. Raises ConfigError where its annotation names none."""
    found = get_type_hints(cls)["options"]
    if found is Any:
        return NoOptions
    if not (isinstance(found, type) and is_dataclass(found)):
        raise ConfigError(
            f"{cls.__qualname__}.options: {found}", "a dataclass of its options", "annotate `options` in the class"
        )
    return found


def make_term(name: str, options: Mapping[str, Any], key: str) -> Term:
    """The term `name`, registered or an import path, with these options; `key` is its place in the configuration.

    Raises:
        ConfigError: an unknown name, a path that does not resolve, or options that the term has not.
    """
    terms = registered()
    if is_import_path(name):
        found = resolve(name, f"{key}.term")
        if isinstance(found, type) and issubclass(found, Term):
            term = found(bind(options_type(found), options, f"{key}.options"))
            term.name = name
            return term
        if callable(found) and not isinstance(found, type):
            return FunctionTerm(name, found, options, key)
        raise ConfigError(
            f"{key}.term={name!r}, which is {found!r:.80}",
            "a subclass of nla_megatron.rewards.Term, or a function of what was measured",
            f"correct {key}.term",
        )
    if name not in terms:
        raise ConfigError(
            f"{key}.term={name!r}",
            f"one of {', '.join(sorted(terms))}, or an import path such as package.module:function",
            f"set {key}.term",
        )
    return terms[name](bind(options_type(terms[name]), options, f"{key}.options"))


class FunctionTerm(Term):
    """A user's function: called with `Measured`, and with its options by name; gives N finite numbers.

    A function with an attribute `once` that is true is computed on one rank.
    """

    def __init__(self, path: str, function: Callable[..., Any], options: Mapping[str, Any], key: str):
        super().__init__(NoOptions())
        self.function, self.given = function, dict(options)
        self.name, self.once = path, bool(getattr(function, "once", False))
        try:
            inspect.signature(function).bind(None, **self.given)
        except (TypeError, ValueError) as error:  # other arguments; or a built-in function that does not tell its own
            raise ConfigError(
                f"{key}.term={path!r} cannot be called with what was measured and {key}.options: {error}",
                "a function of what was measured, and of the options by name",
                f"correct {key}.options",
            ) from None

    def __call__(self, measured: Measured) -> Tensor | Scores:
        found = self.function(measured, **self.given)
        if isinstance(found, Scores):
            return found
        try:
            return torch.as_tensor(found, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError):
            raise RewardError(
                f"{self.name} gave {found!r:.80}", f"{len(measured.rollouts)} numbers", "return a list or a tensor"
            ) from None


def named_values(measured: Measured, name: str, term: str) -> Tensor:
    """The values (N,) fp32 that a task calls `name`. Raises RewardError where it has none."""
    if name not in measured.values:
        raise RewardError(
            f"the reward term {term!r} reads {name!r}, which the task does not measure",
            f"one of {', '.join(sorted(measured.values)) or 'nothing'}",
            f"choose another term or value for {term!r}, or the task that measures it",
        )
    return measured.values[name].detach().float().cpu()


def checked(rewards: Tensor, measured: Measured, term: str) -> Tensor:
    """The rewards of a term, fp32 on the CPU. Raises RewardError unless they are N finite numbers."""
    count = len(measured.rollouts)
    if tuple(rewards.shape) != (count,):
        raise RewardError(
            f"the reward term {term!r} gave values of shape {tuple(rewards.shape)}",
            f"({count},), one number per rollout",
            "correct the term",
        )
    rewards = rewards.detach().float().cpu()
    wrong = (~rewards.isfinite()).nonzero().flatten().tolist()
    if wrong:
        one = measured.rollouts[wrong[0]]
        raise RewardError(
            f"the reward term {term!r} gave {float(rewards[wrong[0]])} for rollout {wrong[0]} (row {one.row}, group"
            f" {one.group}, sample {one.sample}), {len(wrong)} of {count} in all",
            "finite numbers",
            "look at that rollout's text and at the values the term reads",
        )
    return rewards
