"""Options that a registered class or function has of its own: bound to a frozen dataclass, or found by import path."""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import field, fields, make_dataclass
from typing import Any, TypeVar, cast, get_type_hints

from nla_megatron.errors import ConfigError

T = TypeVar("T")


def bind(options_type: type[T], values: Mapping[str, Any], key: str) -> T:
    """A dataclass of options from what a configuration says, with the conversions that every other key has.

    Args:
        options_type: a dataclass; its `__post_init__` checks ranges.
        values: by name; what is left out keeps its default.
        key: where they stand in the configuration, for the message.

    Raises:
        ConfigError: an unknown name, a value of another type or not finite, or none where the dataclass has no default.

    Example:
        >>> bind(HingeOptions, {"cap": 150}, "reward.terms.length.options").cap
        150
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    known = [item.name for item in fields(cast(Any, options_type)) if item.init]
    unknown = sorted(set(values) - set(known))
    if unknown:
        near = difflib.get_close_matches(str(unknown[0]), known, n=1)
        raise ConfigError(
            f"{', '.join(f'{key}.{name}' for name in unknown)}",
            f"some of {', '.join(known)}" if known else f"no {key}: there are none to set",
            f"did you mean {near[0]}?" if near else "remove or correct the key",
        )
    try:
        # Not the dataclass itself: of a frozen one OmegaConf makes a configuration that refuses to be merged into.
        merged = OmegaConf.merge(_plain(options_type), OmegaConf.create(dict(values)))
        missing = sorted(str(name) for name in OmegaConf.missing_keys(merged))
        if not missing:
            _check_finite(merged)
            return options_type(**_as_declared(options_type, cast(Any, OmegaConf.to_object(merged))))
    except ConfigError as error:  # of the dataclass, which does not know where it stands
        raise ConfigError(f"{key}: {error.found}", error.expected, error.remedy) from None
    except OmegaConfBaseException as error:
        # The first line is the reason; the others say where OmegaConf was.
        reason = f"{key}{'.' + error.full_key if error.full_key else ''}: {str(error).splitlines()[0]}"
        raise ConfigError(reason, f"the types of {', '.join(known)}", "correct the value") from None
    raise ConfigError(
        f"no value for {', '.join(f'{key}.{name}' for name in missing)}",
        "a value for every option without a default",
        f"add {' '.join(f'{key}.{name}=...' for name in missing)}",
    )


def is_import_path(name: str) -> bool:
    """Whether a name is none of a registry's but a path: it has a colon."""
    return ":" in name


def _check_finite(options: Any) -> None:
    for name, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name}={value}", "a finite number", f"correct {name}")


def _plain(options_type: type) -> Any:
    """What can be set of a dataclass, as OmegaConf's structure: of a frozen one it would refuse to be merged into."""
    from omegaconf import OmegaConf

    hints = get_type_hints(options_type)
    settable = [
        (item.name, hints[item.name], field(default=item.default, default_factory=item.default_factory))
        for item in fields(cast(Any, options_type))
        if item.init
    ]
    return OmegaConf.structured(make_dataclass(options_type.__name__, settable))


def _as_declared(options_type: type, values: Any) -> dict[str, Any]:
    """OmegaConf gives lists where a field is a tuple."""
    hints = get_type_hints(options_type)
    return {
        name: tuple(value) if isinstance(value, list) and "tuple" in str(hints[name]) else value
        for name, value in vars(values).items()
    }


def check_option(name: str, value: object, kinds: tuple[type, ...], fits: Callable[..., bool], expected: str) -> None:
    """Raises `ConfigError` unless `value` is of one of `kinds` (a bool is no number) and `fits(value)`."""
    if isinstance(value, bool) or not isinstance(value, kinds) or not fits(value):
        raise ConfigError(f"{name} = {value!r}", expected, f"set {name} to {expected}")


def resolve(path: str, key: str) -> Any:
    """What `package.module:Name` names.

    Raises:
        ConfigError: no such form, a module that cannot be imported, or one without the name.
    """
    module_name, _, name = path.partition(":")
    if not (all(part.isidentifier() for part in module_name.split(".")) and name.isidentifier()):
        raise ConfigError(f"{key}={path!r}", "an import path such as package.module:Name", f"correct {key}")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        raise ConfigError(
            f"{key}={path!r}, whose module cannot be imported: {type(error).__name__}: {error}",
            "a module on Python's path",
            f"put the folder of {module_name.partition('.')[0]} into PYTHONPATH, or correct {key}",
        ) from error
    if not hasattr(module, name):
        near = ", ".join(sorted(one for one in vars(module) if not one.startswith("_"))[:12]) or "nothing"
        raise ConfigError(
            f"{key}={path!r}: no {name} in {module.__name__}", f"one of its names: {near}", f"correct {key}"
        )
    return getattr(module, name)
