"""Figures as a person reads them: names in words, numbers rounded, intervals as from and to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nla_megatron.config.run_directory import flat
from nla_megatron.evaluation.charts import format_value
from nla_megatron.evaluation.denominator import denominator

_NAMES = {name: name.upper() for name in ("fve", "av", "ar", "rl", "sft", "mse", "kl", "sae")}
_INTERVAL = "_ci95"
_BASELINE = "fve_baseline"
_DIGITS = 3


def words(key: str) -> str:
    """`fve_gain` as `FVE gain`."""
    if not key:
        return ""
    named = " ".join(_NAMES.get(word, word) for word in key.replace(".", ": ").split("_"))
    return named[0].upper() + named[1:]


def shown(value: Any) -> str:
    """A value rounded for reading; what was not measured is named so."""
    if value is None or (isinstance(value, float) and value != value):
        return "not measured"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else format_value(value, _DIGITS)
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{words(str(key))} {shown(one)}" for key, one in value.items())
    return json.dumps(value)


def interval(bounds: Any) -> str:
    return f"{shown(bounds[0])} to {shown(bounds[1])}"


def facts(figures: Mapping[str, Any]) -> dict[str, str]:
    """Every figure by its name in words, a 95 % interval beside its estimate."""
    values = flat(figures)
    found: dict[str, str] = {}
    for key, value in values.items():
        beside = key.endswith(_INTERVAL) and key.removesuffix(_INTERVAL) in values
        if beside or (key == f"{_BASELINE}_rows" and _BASELINE in values):
            continue
        bounds = values.get(f"{key}{_INTERVAL}")
        if key == _BASELINE:
            found["FVE compares with"] = denominator(value, values.get(f"{_BASELINE}_rows"))
        elif key.endswith(_INTERVAL) and _is_interval(value):
            found[f"{words(key.removesuffix(_INTERVAL))}, 95 % interval"] = interval(value)
        else:
            found[words(key)] = shown(value) + (f" (95 %: {interval(bounds)})" if _is_interval(bounds) else "")
    return found


def _is_interval(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2


def table(figures: Mapping[str, Any]) -> str:
    """One line for each figure."""
    found = facts(figures)
    width = max((len(name) for name in found), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in found.items())
