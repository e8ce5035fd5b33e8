"""Limits of values, named where they are broken."""

from __future__ import annotations

from nla_megatron.errors import ConfigError

DTYPES = ("float32", "bfloat16")
STORED_DTYPES = ("float32", "bfloat16", "float16")


def one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{key}={value!r}", f"one of {', '.join(choices)}", f"set {key}= to one of these")


def at_least(key: str, value: float, least: float) -> None:
    if not value >= least:  # so that NaN is refused too
        raise ConfigError(f"{key}={value}", f"at least {least:g}", f"raise {key}=")


def ascending(low_key: str, low: float, high_key: str, high: float) -> None:
    if not low < high:
        raise ConfigError(f"{low_key}={low} with {high_key}={high}", "low < high", "swap them")


def share(key: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(f"{key}={value}", "between 0 and 1", f"correct {key}=")
