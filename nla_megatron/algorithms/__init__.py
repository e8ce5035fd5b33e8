"""Algorithms write numbers: rewards become advantages, log-probs per-token losses. The trainer knows no names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from nla_megatron.config.schema import AlgorithmConfig
from nla_megatron.errors import ConfigError
from nla_megatron.types import Credit


class Algorithm(Protocol):
    """What the training loop asks of an algorithm."""

    def credit(self, rewards_N: Tensor, groups_N: Tensor) -> Credit: ...

    def token_loss(
        self, logprobs_BT: Tensor, old_BT: Tensor, reference_BT: Tensor | None, advantages_B: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]: ...


_ALGORITHMS: dict[str, Callable[[AlgorithmConfig], Algorithm]] = {}


def register(name: str) -> Callable[[Callable[[AlgorithmConfig], Algorithm]], Callable[[AlgorithmConfig], Algorithm]]:
    """A decorator that makes an algorithm known by name; a name is taken once."""

    def add(factory: Callable[[AlgorithmConfig], Algorithm]) -> Callable[[AlgorithmConfig], Algorithm]:
        if name in _ALGORITHMS:
            raise ValueError(f"algorithm {name!r} is registered already")
        _ALGORITHMS[name] = factory
        return factory

    return add


def make_algorithm(config: AlgorithmConfig) -> Algorithm:
    """Raises ConfigError for an unknown name."""
    from nla_megatron.algorithms import grpo  # noqa: F401 - registers itself

    if config.name not in _ALGORITHMS:
        raise ConfigError(
            f"algorithm.name={config.name!r}", f"one of {', '.join(sorted(_ALGORITHMS))}", "set algorithm.name="
        )
    return _ALGORITHMS[config.name](config)
