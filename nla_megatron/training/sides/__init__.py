"""The sides of `rl`, one per task: what each brings to the loop. The loop knows no task's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from nla_megatron.config.schema import RlConfig
from nla_megatron.errors import ConfigError
from nla_megatron.parallel.world import World

if TYPE_CHECKING:
    from nla_megatron.training.sides.base import Side

_SIDES: dict[str, type[Side]] = {}


def register(name: str) -> Callable[[type[Side]], type[Side]]:
    """A decorator that makes a task's side known by the task's name; a name is taken once.

    Raises:
        ConfigError: another side has that name.
    """

    def add(side: type[Side]) -> type[Side]:
        if name in _SIDES:
            raise ConfigError(f"a second side of task {name!r}", f"one; {_SIDES[name].__name__} has it", "rename it")
        _SIDES[name] = side
        return side

    return add


def side_of(config: RlConfig) -> type[Side]:
    """Raises ConfigError for an unknown task."""
    from nla_megatron.training.sides import nla, plain, sae  # noqa: F401 - each registers itself

    if config.task.name not in _SIDES:
        raise ConfigError(f"task.name={config.task.name!r}", f"one of {', '.join(sorted(_SIDES))}", "set task=")
    return _SIDES[config.task.name]


def make_side(config: RlConfig, world: World) -> Side:
    """The side of `config.task`, with its models; collective."""
    return side_of(config)(config, world)
