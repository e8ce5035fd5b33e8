"""Where problems come from: one interface, one registry.

A provider is a class with `@register(name)`, or any class by its import path; its keyword arguments are its options.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from nla_megatron.config.options import bind, is_import_path, resolve
from nla_megatron.config.registry import Registry
from nla_megatron.errors import ConfigError


@dataclass(frozen=True)
class Problem:
    """One problem. `reference`: the answer that responses are compared with; None where the source's is unreadable.

    `level`, `subject`: as the source has them, for the statistics and for choosing. `before`: (role, content) of what
    was said before the question. `place`: where its row can be found again, for records.

    Example:
        >>> Problem("What is 3 + 4?", "7", "1", "arithmetic")
    """

    question: str
    reference: str | None
    level: str = ""
    subject: str = ""
    before: tuple[tuple[str, str], ...] = ()
    place: Mapping[str, Any] = field(default_factory=dict, compare=False)


class Provider(Protocol):
    """Problems by number, the same on every rank and at every start."""

    def __len__(self) -> int: ...

    def problem(self, index: int) -> Problem:
        """Number `index` of `len(self)`."""

    unreadable: int
    """How many problems were left out because no reference answer could be read."""


_PROVIDERS: Registry[type[Any]] = Registry("provider of problems")
register = _PROVIDERS.register
"""Class decorator: makes a dataclass known to `make_provider` by name."""


def make_provider(name: str, options: Mapping[str, Any], where: str = "task.options.provider") -> Provider:
    """The provider of a registered name or of an import path (`package.module:Class`) with its options.

    Raises:
        ConfigError: an unknown name, path or option, a value of another type, or a class that is no provider.
        MissingFile, ColumnError: of what it reads.
    """
    # Registers ours; inside, because the modules import the names above.
    from nla_megatron.tasks.math import files, generator  # noqa: F401

    if is_import_path(name):
        cls = resolve(name, where)
        if not (hasattr(cls, "problem") and hasattr(cls, "__len__") and hasattr(cls, "__dataclass_fields__")):
            raise ConfigError(
                f"{where}={name!r}, which is {cls!r}", "a dataclass with `problem(index)` and `__len__`",
                "see nla_megatron.tasks.math.problems.Provider",
            )  # fmt: skip
    elif name in _PROVIDERS:
        cls = _PROVIDERS[name]
    else:
        known = ", ".join(sorted(_PROVIDERS))
        raise ConfigError(f"{where}={name!r}", f"one of {known}, or an import path", f"correct {where}")
    provider: Provider = bind(cls, options, f"{where}[{name}]")
    return provider
