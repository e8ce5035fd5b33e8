"""Rewards: from what a task measured of each rollout to one number per rollout. Pure torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from nla_megatron.config.schema import RewardConfig
from nla_megatron.errors import ConfigError
from nla_megatron.types import Measured, Scores


class Reward(Protocol):
    """From a step's measurements to rewards; `step` is the trainer's, 0-based, for schedules.

    `state` and `load_state`: what must survive a resume, such as a moving average; numbers alone.
    """

    def __call__(self, measured: Measured, step: int) -> Scores: ...

    def state(self) -> dict[str, float]: ...

    def load_state(self, state: dict[str, float]) -> None: ...


_REWARDS: dict[str, Callable[[RewardConfig], Reward]] = {}


def register(name: str) -> Callable[[Callable[[RewardConfig], Reward]], Callable[[RewardConfig], Reward]]:
    """A decorator that makes a reward known by name; a name is taken once."""

    def add(factory: Callable[[RewardConfig], Reward]) -> Callable[[RewardConfig], Reward]:
        if name in _REWARDS:
            raise ValueError(f"reward {name!r} is registered already")
        _REWARDS[name] = factory
        return factory

    return add


def make_reward(config: RewardConfig) -> Reward:
    """Raises ConfigError for an unknown name."""
    from nla_megatron.rewards import reconstruction  # noqa: F401 - registers itself

    if config.name not in _REWARDS:
        raise ConfigError(f"reward.name={config.name!r}", f"one of {', '.join(sorted(_REWARDS))}", "set reward.name=")
    return _REWARDS[config.name](config)
