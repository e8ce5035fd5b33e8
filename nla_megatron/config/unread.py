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

from nla_megatron.config.compose import completed
from nla_megatron.config.run_directory import RECORD, flat, run_record, same_value
from nla_megatron.errors import ConfigError

_WORD = re.compile(r"[+~]*([^=@]+)[^=]*=?(.*)", re.DOTALL)
Unread = tuple[str, str]
"""The dotted key of a value or of a group, and in words when it is not read."""


def idle(command: str, config: Any, overrides: Sequence[str], unread: Sequence[Unread]) -> dict[str, ConfigError]:
    """The keys of `unread` that were typed with another value than their default, each with its refusal."""
    typed = {key: [one for word in overrides if (one := _typed(word, key)) is not None] for key, _ in unread}
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


def _typed(word: str, key: str) -> str | None:
    """What a word of the command line sets of a key: all of it, or a part. None for nothing."""
    match = _WORD.match(word)
    assert match is not None
    name, value = match.groups()
    # `rollout={tp: 2}` types rollout.tp; what `rollout=tp2` sets is its file's.
    return name if _in(name, key) or (_in(key, name) and value.startswith("{")) else None


def _in(name: str, group: str) -> bool:
    return name == group or name.startswith(f"{group}.")
