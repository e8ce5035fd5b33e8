"""What a configuration can name: classes and functions by a name that is taken once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from nla_megatron.errors import ConfigError

T = TypeVar("T")
R = TypeVar("R")


class Registry(Mapping[str, T], Generic[T]):
    """By name, what registered itself when its module was imported.

    Args:
        what: a word for one of them, in messages.
        named: whether each is told its name, as its attribute `name`.

    Example:
        >>> RULERS: Registry[type] = Registry("ruler")
        >>> @RULERS.register("metric")
        ... class Metric: ...
    """

    def __init__(self, what: str, named: bool = False):
        self.what, self.named, self._known = what, named, dict[str, T]()

    def register(self, name: str) -> Callable[[R], R]:
        """A decorator that makes what it stands above known as `name`. Raises ConfigError where the name is taken."""

        def add(item: R) -> R:
            if name in self._known:
                raise ConfigError(
                    f"a second {self.what} {name!r} ({_told(item)})", f"one; {_told(self._known[name])} has it",
                    "choose another name",
                )  # fmt: skip
            if self.named:
                item.name = name  # type: ignore[attr-defined]
            self._known[name] = item  # type: ignore[assignment]
            return item

        return add

    def __getitem__(self, name: str) -> T:
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


def _told(item: Any) -> str:
    return str(getattr(item, "__qualname__", item))
