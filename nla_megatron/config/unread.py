"""What was typed for a command and is not read in the mode that it runs in: whoever typed it believes that it does
something.

Which keys these are is said by each command's module, in `unread`. What a recipe or a group's file sets besides may be
idle, a run that has begun goes on as it was told, and of a sweep's jobs one has to read it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from nla_megatron.config.compose import completed
from nla_megatron.config.run_directory import RECORD, flat, run_record, same_value
from nla_megatron.errors import ConfigError

_WORD = re.compile(r"[+~]*([^=@]+)[^=]*=?(.*)", re.DOTALL)
Unread = tuple[str, str]
"""The dotted key of a value or of a group, and in words when it is not read."""


def idle(command: str, config: Any, overrides: Sequence[str], unread: Sequence[Unread]) -> dict[str, ConfigError]:
    """The keys of `unread` that were typed with another value than their default, each with its refusal."""
    typed = {key: [name for word in overrides for name in _typed(word) if _in(name, key)] for key, _ in unread}
    if not any(typed.values()) or (Path(config.out) / RECORD).is_file():
        return {}
    found = run_record(command, config)
    task = {"task": {**found["task"], "options": {}}} if "task" in found else {}
    values, usual = flat(found), flat(completed(command, task))
    refusals: dict[str, ConfigError] = {}
    for key, when in unread:
        for name in (name for name in values if _in(name, key) and any(_in(name, one) for one in typed[key])):
            before = usual.get(name)
            if not same_value(values[name], before):
                found_idle = f"{name}={values[name]!r} {when}, which does not read it"
                refusals[name] = ConfigError(found_idle, f"{name}={before!r}, its default", f"leave {name} out")
    return refusals


def _typed(word: str) -> list[str]:
    """The keys that a word of the command line sets; of `rollout=tp2` that is `rollout`, the rest is its file's."""
    match = _WORD.match(word)
    assert match is not None
    name, value = match.groups()
    if not value.startswith("{"):
        return [name]
    try:
        return [f"{name}.{key}" for key in flat(yaml.safe_load(value))]  # `rollout={tp: 2}` is rollout.tp=2
    except yaml.YAMLError:
        return []


def _in(name: str, group: str) -> bool:
    return name == group or name.startswith(f"{group}.")
