"""Options with free keys in YAML become frozen dataclasses: unknown keys, wrong types and unknown paths are named."""

from __future__ import annotations

import difflib
import importlib
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from nla_megatron.errors import ConfigError

T = TypeVar("T")


def bind(cls: type[T], options: Mapping[str, Any], where: str) -> T:
    """`cls(**options)` for a dataclass, after checking names and types against its fields.

    Args:
        where: how a user writes the options' key, for messages ("task.options").

    Raises:
        ConfigError: an unknown key, a missing one, or a value of another type.
    """
    known = {item.name: item for item in fields(cls) if item.init}  # type: ignore[arg-type]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            raise ConfigError(
                f"{where}.{name}", f"one of {', '.join(known) or 'nothing'}",
                f"did you mean {near[0]}?" if near else "remove it",
            )  # fmt: skip
    missing = [
        name for name, item in known.items()
        if item.default is MISSING and item.default_factory is MISSING and name not in options
    ]  # fmt: skip
    if missing:
        raise ConfigError(f"no {where}.{missing[0]}", f"a value for {', '.join(missing)}", f"add {where}.{missing[0]}=")
    hints = typing.get_type_hints(cls)
    return cls(**{name: _fitted(value, hints[name], f"{where}.{name}") for name, value in options.items()})


def resolve(path: str, where: str) -> Any:
    """What an import path names: `package.module:name` or `package.module.name`.

    Raises:
        ConfigError: the module cannot be found or does not import, or it has no such name.
    """
    module_name, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    expected, remedy = "`package.module:name`, importable where the run starts", f"correct {where}, or set PYTHONPATH"
    if not module_name or not name:
        raise ConfigError(f"{where}={path!r}", expected, remedy)
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError, ValueError) as error:
        raise ConfigError(f"{where}={path!r}: {error}", expected, remedy) from error
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"{where}={path!r}: {module_name} has no {name!r}", expected, remedy)
        found = getattr(found, part)
    return found


def is_import_path(name: str) -> bool:
    """Whether a name is none of a registry's: it has a colon or a dot."""
    return ":" in name or "." in name


def _fitted(value: Any, hint: Any, where: str) -> Any:
    """The value as its field has it: lists become tuples where those are asked for, whole numbers floats."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        kinds = [kind for kind in arguments if kind is not type(None)]
        fitting = [kind for kind in kinds if _fits(value, kind)]
        return _fitted(value, (fitting or kinds)[0], where)
    if not _fits(value, hint):
        raise ConfigError(f"{where}={value!r}", _name(hint), f"set {where}= to such a value")
    if origin is tuple:
        return tuple(_fitted(each, arguments[0], where) for each in value)
    if origin is list:
        return [_fitted(each, arguments[0], where) for each in value]
    if origin in (dict, Mapping):
        return {str(key): _fitted(each, arguments[1], f"{where}.{key}") for key, each in value.items()}
    return float(value) if hint is float else value


def _fits(value: Any, hint: Any) -> bool:
    kind = typing.get_origin(hint) or hint
    if kind in (tuple, list):
        return isinstance(value, list | tuple)
    if kind in (dict, Mapping):
        return isinstance(value, Mapping)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _name(hint: Any) -> str:
    kind = typing.get_origin(hint) or hint
    return _NAMES.get(kind, "a list" if kind in (list, tuple) else "keys with values")
