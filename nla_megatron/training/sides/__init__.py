"""The sides of `rl`, one per task: what each brings to the loop. The loop knows no task's name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nla_megatron.config.registry import Registry
from nla_megatron.config.schema import RlConfig
from nla_megatron.errors import ConfigError
from nla_megatron.parallel.world import World

if TYPE_CHECKING:
    from nla_megatron.training.sides.base import Side

_SIDES: Registry[type[Side]] = Registry("side of task")
register = _SIDES.register
"""A decorator that makes a task's side known by the task's name."""


def side_of(config: RlConfig) -> type[Side]:
    """Raises ConfigError for an unknown task."""
    from nla_megatron.training.sides import nla, plain, sae  # noqa: F401 - each registers itself

    if config.task.name not in _SIDES:
        raise ConfigError(f"task.name={config.task.name!r}", f"one of {', '.join(sorted(_SIDES))}", "set task=")
    return _SIDES[config.task.name]


def make_side(config: RlConfig, world: World) -> Side:
    """The side of `config.task`, with its models; collective."""
    return side_of(config)(config, world)
