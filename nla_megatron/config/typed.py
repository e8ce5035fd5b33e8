"""What is typed for a key of text is taken as it stands; the command line's grammar is for the other keys.

Which keys these are the schema says. The grammar is Hydra's, to which `#`, `!`, `<`, a comma or `(1)` in a path mean
something, and `1e3` a number. Quotes around a whole value are its own, and taken off.
"""

from __future__ import annotations

import re
import shlex
import types
from collections.abc import Sequence
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

from nla_megatron.errors import ConfigError

_WORD = re.compile(r"(\+{0,2})([\w.-]+)=(.*)", re.DOTALL)
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_BARE = re.compile(r"[A-Za-z_/][\w/.\-]*", re.ASCII)
"""Texts that the grammar reads as themselves."""
_OPENING = ("[", "{", "'", '"', "$")
_NO_TEXT = ("true", "false", "null", "inf", "nan")
_SWEPT = re.compile(r"(choice|range|glob|interval|shuffle|sort|tag)\(.*\)", re.DOTALL)


def quoted(value: str) -> str:
    """A text as one value of an override, whatever it holds; `${...}` keeps its meaning."""
    return "'" + re.sub(r"(\\*)('|$)", lambda end: end[1] * 2 + ("\\'" if end[2] else ""), value) + "'"


def texts_quoted(schema: type, overrides: Sequence[str], swept: bool = False) -> list[str]:
    """The overrides with quotes where a key of text is given something that the grammar would not take as it stands.

    Args:
        swept: a value may be several, `a,b` or `choice(a,b)`. A path that is there is one, commas or not; any other
            text with a comma is one inside quotes.
    """
    return [_as_text(schema, word, swept) for word in overrides]


def _as_text(schema: type, word: str, swept: bool) -> str:
    found = _WORD.fullmatch(word)
    if found is None:
        return word
    sign, key, value = found.groups()
    hint = type_of(schema, key)
    if hint is None and not value.startswith(_OPENING) and not _BARE.fullmatch(value) and _is_path(value):
        return f"{sign}{key}={quoted(value)}"
    if _plain(hint) is not str:
        return word
    if not swept or ("," not in value and not _SWEPT.fullmatch(value)) or _is_there(value):
        return f"{sign}{key}={_one(value, is_optional(schema, key))}"
    if _SWEPT.fullmatch(value):
        return word
    return f"{sign}{key}={','.join(_one(part, is_optional(schema, key)) for part in _parts(value))}"


def _one(value: str, optional: bool) -> str:
    as_it_stands = not value or _QUOTED.fullmatch(value) or (value == "null" and optional)
    if as_it_stands or (_BARE.fullmatch(value) and value.lower() not in _NO_TEXT):
        return value
    return quoted(value)


def _parts(value: str) -> list[str]:
    """What commas outside quotes separate."""
    found, start = [""], 0
    for match in re.finditer(rf"{_QUOTED.pattern}|,", value, re.DOTALL):
        if match[0] == ",":
            found[-1] += value[start : match.start()]
            found.append("")
            start = match.end()
    found[-1] += value[start:]
    return [part.strip() for part in found]


def _is_there(value: str) -> bool:
    try:
        return Path(value).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, with a null, of an unknown user: no path but a text
        return False


def _is_path(value: str) -> bool:
    """Whether a value of a key that may be anything is a path: of one that is there, and no number or word."""
    return re.search(r"[^\w.+-]", value) is not None and _is_there(value)


def home_expanded(value: str) -> str:
    """`~` and `~user` at the beginning of a path as the shell would have it, which does so only where a word begins."""
    if not re.match(r"~[\w.-]*/", value):
        return value
    try:
        return str(Path(value).expanduser())
    except RuntimeError:
        return value  # no such user: a name that begins so


def is_optional(schema: type, key: str) -> bool:
    found = type_of(schema, key)
    return found is not None and type(None) in get_args(found)


def type_of(schema: type, key: str) -> Any:
    """The declared type of a dotted key; None where the schema leaves it open, or has no such key."""
    found: Any = schema
    for name in key.split("."):
        plain: Any = _plain(found)
        if is_dataclass(plain):
            found = _hints(cast(Any, plain)).get(name)
        elif get_origin(plain) is dict:
            found = get_args(plain)[1]
        else:
            return None
    return None if found is Any else found


@cache
def _hints(schema: Any) -> dict[str, Any]:
    return get_type_hints(schema)


def _plain(hint: Any) -> Any:
    """`str | None` as `str`."""
    if get_origin(hint) in (Union, types.UnionType):
        rest = [one for one in get_args(hint) if one is not type(None)]
        return rest[0] if len(rest) == 1 else hint
    return hint


def check_grammar(command: str, schema: type, overrides: Sequence[str], groups: Path) -> None:
    """Raises ConfigError for the first word that the grammar cannot read, with what to type instead, and for a choice
    among the files of a group, a folder of `groups`, that is no name."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    for word in overrides:
        if word.lstrip("+~").startswith("=") or not word.strip("+~ "):
            raise ConfigError(f"the word {word!r}, without a key", "KEY=VALUE", f"`nla-megatron {command} --help`")
        try:
            _check_choice(parser.parse_override(word), groups)
        except HydraException as error:
            found = _WORD.fullmatch(word)
            if found is None:
                raise ConfigError(
                    f"the word {word!r}", f"KEY=VALUE for a key of `nla-megatron {command}`",
                    f"quote values with spaces for the shell, {shlex.quote('KEY=a value')}; "
                    f"`nla-megatron {command} --help` lists the keys",
                ) from None  # fmt: skip
            sign, key, value = found.groups()
            form = _suggested(schema, key, value)
            if form == value:
                raise ConfigError(
                    f"{key}={value}: {' '.join(str(error).split())[:200]}", "a value in Hydra's grammar", "correct it"
                ) from None
            raise ConfigError(
                f"{key}={value}, where {_culprits(value)} means something to the command line's grammar",
                "a number, a word, [a,b], {a:1}, or a text in quotes", f"type {shlex.quote(f'{sign}{key}={form}')}",
            ) from None  # fmt: skip


def _check_choice(override: Any, groups: Path) -> None:
    key = override.get_key_element().lstrip("+")
    if key.startswith("~") or not key:
        return
    value, folder = override.value(), groups / key
    named = isinstance(value, str | list | dict) or override.is_sweep_override()
    if not named and "." not in key and folder.is_dir():
        names = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        if key == "recipe" and value is None:
            return
        raise ConfigError(
            f"{override.input_line}, a choice that is no name", f"one of {names}", f"choose one, or leave {key}= out"
        )


def _suggested(schema: type, key: str, value: str) -> str:
    """The value with quotes where they have to be."""
    if get_origin(_plain(type_of(schema, key))) is list or (value.startswith("[") and value.endswith("]")):
        inside = value.removeprefix("[").removesuffix("]")
        return "[" + ",".join(_one(part, False) for part in _parts(inside)) + "]"
    return value if _QUOTED.fullmatch(value) else quoted(value)


def _culprits(value: str) -> str:
    special = dict.fromkeys(re.findall(r"[^\w\s/.\-+@%?|*:$~]", value))
    return " ".join(special) if special else "something"
