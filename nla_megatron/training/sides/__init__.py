"""The sides of `rl` by task: what each task brings to the loop. The loop knows no names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from nla_megatron.config.schema import RlConfig
from nla_megatron.errors import ConfigError
from nla_megatron.parallel.world import World
from nla_megatron.training.side import Side


class SideClass(Protocol):
    """A class of sides: made from the configuration, after its `check`."""

    def __call__(self, config: RlConfig, world: World) -> Side: ...

    def check(self, config: RlConfig, world_size: int) -> None:
        """Everything that can be known before the first step; raises a named error."""


S = TypeVar("S", bound=SideClass)
_SIDES: dict[str, SideClass] = {}


def register(name: str) -> Callable[[S], S]:
    """Class decorator: makes a side known by its task's name; a name is taken once. Raises ConfigError."""

    def add(cls: S) -> S:
        if name in _SIDES:
            raise ConfigError(f"a second side of the task {name!r}", "one", "choose another name")
        _SIDES[name] = cls
        return cls

    return add


def _class_of(name: str) -> SideClass:
    # Registers ours; inside, because the modules import the names above.
    from nla_megatron.training.sides import plain  # noqa: F401

    if name not in _SIDES:
        raise ConfigError(f"task.name={name!r}", f"one of {', '.join(sorted(_SIDES))}", "correct task=")
    return _SIDES[name]


def check_side(config: RlConfig, world_size: int) -> None:
    """The checks of the task's side; raises a named error."""
    _class_of(config.task.name).check(config, world_size)


def make_side(config: RlConfig, world: World) -> Side:
    """The side of the task that the configuration names; collective."""
    return _class_of(config.task.name)(config, world)
