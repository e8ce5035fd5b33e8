"""Several values for one key: Hydra's sweep grammar (`a,b`, `choice()`, `range()`, `glob()`), taken apart."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nla_megatron.config.compose import conf_dir, named_refusal, store_schemas
from nla_megatron.config.typed import check_grammar, quoted, texts_quoted
from nla_megatron.errors import ConfigError

_LABEL_LENGTH = 100
_SPECIAL, _ESCAPED = re.compile(r"([\\()\[\]{}:=, \t])"), r"\\\1"
"""What means something to Hydra's grammar in the key of a dictionary."""


@dataclass(frozen=True)
class Axis:
    """A key with the values that it takes in turn, each as it would be typed."""

    key: str
    values: tuple[str, ...]


def axes_of(command: str, overrides: Sequence[str]) -> tuple[list[str], list[Axis]]:
    """The overrides that are the same in every job, as typed, and those that are swept.

    A key that is given twice counts as Hydra counts it: the last one.

    Raises:
        ConfigError: what Hydra's grammar does not know, `interval()`, which has no end, and a key without a value.
    """
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    from nla_megatron.config.schema import SCHEMAS

    if command not in SCHEMAS:
        raise ConfigError(f"command {command!r}", f"one of {', '.join(SCHEMAS)}", "run `nla-megatron --help`")
    overrides = texts_quoted(SCHEMAS[command], overrides, swept=True)
    check_grammar(command, SCHEMAS[command], overrides, conf_dir())
    fixed: dict[str, str] = {}
    axes: dict[str, Axis] = {}
    try:
        store_schemas()
        with initialize_config_dir(str(conf_dir()), version_base="1.3", job_name=command):
            # `glob()` asks the loader which files a group has.
            parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
            for override in parser.parse_overrides(list(overrides)):
                key = override.get_key_element()
                fixed.pop(key, None)
                axes.pop(key, None)
                if not override.is_sweep_override():
                    fixed[key] = str(override.input_line)
                elif override.is_discrete_sweep():
                    axes[key] = Axis(key, tuple(override.sweep_string_iterator()))
                else:
                    raise ConfigError(
                        f"{override.input_line}", "values that can be counted: a,b, choice(a,b) or range(0,3)",
                        f"list the values of {key}",
                    )  # fmt: skip
    except HydraException as error:
        raise named_refusal(command, SCHEMAS[command], error) from None
    empty = [axis.key for axis in axes.values() if not axis.values]
    if empty:
        raise ConfigError(
            f"no value for {empty[0]}: a sweep of zero jobs", "at least one value", f"correct {empty[0]}="
        )
    return list(fixed.values()), list(axes.values())


def points_of(axes: Sequence[Axis]) -> list[dict[str, str]]:
    """Every combination, the last key changing fastest; one without a key where nothing is swept."""
    keys = [axis.key for axis in axes]
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*(axis.values for axis in axes))]


def label_of(point: dict[str, str]) -> str:
    """`optim.lr=0.0001,seed=0`: a name for a directory, without slashes, spaces and quotes."""
    parts = (f"{key.lstrip('+')}={_plain(value)}" for key, value in point.items())
    return ",".join(parts)[:_LABEL_LENGTH]


def _plain(value: str) -> str:
    return re.sub(r"[^\w.@+-]+", "-", value).strip("-")


def literal(value: Any) -> str:
    """A value of a configuration as an override gives it.

    Example:
        >>> literal({"levels": [1, 2], "path": "a b.parquet", "hub": None})
        "{levels:[1,2],path:'a b.parquet',hub:null}"
    """
    if isinstance(value, dict):
        pairs = (f"{_SPECIAL.sub(_ESCAPED, str(key))}:{literal(one)}" for key, one in value.items())
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(literal, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return quoted(value) if isinstance(value, str) else repr(value)
