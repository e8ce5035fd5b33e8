"""Write docs/configuration.md from the configuration's schema, or with --check say whether it is out of date.

The schema gives names, types and limits, its docstrings the meaning, and Hydra's composition the defaults that a user
really gets. A key without a meaning, or a meaning without a key, ends the tool: the page is always complete.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
import textwrap
import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from nla_megatron.config.compose import conf_dir, describe
from nla_megatron.config.recipes import GROUP, command_of
from nla_megatron.config.schema import SCHEMAS, RewardTermConfig
from nla_megatron.launch.commands import COMMANDS
from nla_megatron.rewards.terms import options_type, registered

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
REQUIRED = "???"

MEANINGS: dict[str, dict[str, str]] = yaml.safe_load(
    (Path(__file__).parent / "config_meanings.yaml").read_text(encoding="utf-8")
)

INTRO = """# Configuration

This page is written by `python tools/make_config_docs.py`. Do not edit it: change the schema and run the tool.

A command takes `key=value` arguments. Nested keys have dots: `optim.lr=1e-5`. A group takes the name of a file of
`conf/`: `parallel=tp2`. Later arguments win, so `parallel=tp2 parallel.timeout_minutes=30` does both. Unknown keys and
wrong types are refused, with the nearest known key in the message. `nla-megatron COMMAND --help` prints the same keys.

The syntax is [Hydra's](https://hydra.cc/docs/advanced/override_grammar/basic/). Quote what your shell would read:
`'fractions={av_sft: 0.3, ar_sft: 0.3, rl: 0.4}'`. A provider's own options are not part of the schema and take a plus:
`+provider.options.n_keywords=2`.

A key whose type here is `str` takes text as it stands, without quotes of its own: `out=1e3`, `out=a,b`,
`model=~/my models (1)/ü#1`, `templates.marker=<x>`; `~/` at the beginning of a path is your home directory. Your shell
may want quotes: `'model=a b'`. `null` is no text where that is allowed, `${seed}` the value of another key. Quotes
around all of a value are taken off. In a sweep a comma separates values; one that belongs to a value is inside quotes,
`"av='a,b',c"`, or in a path that is there.

Four things that every command has and not every command reads: `parallel` is refused by `explain`, `build`,
`judge`, `merge` and `adopt`, which run in one process, `seed` by `export`, which draws nothing, `allow_unknown_config`
by `pretrain`, `explain` and `judge`, which read no model, and only the training commands log scalars, so elsewhere only
`logger.progress` counts.
"""

RECIPES = """
## Recipes

A recipe sets keys of several groups. The command line wins over it, with keys and with what a group's file sets that is
chosen there. [migration.md](migration.md) has them option by option.
"""


def meanings(cls: type) -> dict[str, str]:
    """Key -> meaning, from attribute docstrings, `Args:` sections and `MEANINGS`, over the class and its bases."""
    found: dict[str, str] = {}
    for base in reversed([one for one in cls.__mro__ if is_dataclass(one)]):
        node = _class_node(base)
        for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
            text = following.value if isinstance(following, ast.Expr) else None
            if isinstance(statement, ast.AnnAssign) and isinstance(text, ast.Constant):
                found[ast.unparse(statement.target)] = " ".join(str(text.value).split())
        found |= _args_section(base) | MEANINGS.get(base.__name__, {})
    # A user types null where Python says None.
    return {name: re.sub(r"\bNone\b", "null", text[:1].upper() + text[1:]) for name, text in found.items()}


def _class_node(cls: type) -> ast.ClassDef:
    node = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(node, ast.ClassDef)
    return node


def _args_section(cls: type) -> dict[str, str]:
    """Name -> text of the `Args:` section of a class's docstring."""
    _, _, rest = (inspect.getdoc(cls) or "").partition("Args:\n")
    found: dict[str, str] = {}
    name = ""
    for line in textwrap.dedent(rest.split("\n\n")[0]).splitlines():
        if not line.startswith(" "):
            name, _, line = line.partition(":")
        found[name] = f"{found.get(name, '')} {line.strip()}".strip()
    return found


def limits(cls: type) -> dict[str, str]:
    """Key -> its allowed values, read from the checks in `__post_init__`."""
    found: dict[str, str] = {}
    for base in [one for one in cls.__mro__ if is_dataclass(one)]:
        for node in ast.walk(_class_node(base)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) == 3):
                continue
            value, bound = (ast.unparse(one).replace("self.", "") for one in node.args[1:])
            if node.func.id == "one_of":
                named = vars(sys.modules[base.__module__])  # the choices are written out, or a constant of the module
                choices = named[bound] if bound in named else ast.literal_eval(bound)
                found[value] = "One of " + ", ".join(f"`{choice}`" for choice in choices) + "."
            elif node.func.id == "at_least":
                found[value] = f"At least {bound}."
    return found


def type_name(hint: Any) -> str:
    """A type as a reader says it."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join("null" if one is type(None) else type_name(one) for one in get_args(hint))
    return str(hint) if get_origin(hint) else hint.__name__


def schema_default(item: Field[Any]) -> Any:
    """A default; a block's as the mapping that YAML has."""
    value = item.default_factory() if item.default_factory is not MISSING else item.default
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def shown(value: Any) -> str:
    """A default as it would be typed."""
    if value == REQUIRED:
        return "**required**"
    if isinstance(value, dict):
        if any(isinstance(one, list) for one in value.values()):
            return "see its group"
        return "`{" + ", ".join(f"{key}: {one}" for key, one in value.items()) + "}`"
    if isinstance(value, bool) or value is None:
        return f"`{'null' if value is None else str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) and value < 1e-3 else f"`{value}`"


def rows(cls: type, values: dict[str, Any], own: type | None = None) -> Iterator[str]:
    """The table's rows: required keys first, nested blocks last."""
    hints, known, allowed = get_type_hints(cls), meanings(cls), limits(cls)
    items = [item for item in fields(cls) if own is None or item.name not in {one.name for one in fields(own)}]
    order = sorted(items, key=lambda item: (is_dataclass(hints[item.name]), values[item.name] != REQUIRED))
    for item in order:
        hint, value = hints[item.name], values[item.name]
        if item.name not in known:
            raise SystemExit(f"{cls.__name__}.{item.name} has no meaning: write a docstring below it in the schema")
        text = " ".join(filter(None, (known[item.name], allowed.get(item.name)))).replace("|", "\\|")
        if is_dataclass(hint):
            link = f"[{type_name(hint)}](#{type_name(hint).lower()})"
            yield f"| `{item.name}.…` | {link} | {_changed(hint, value)} | {text} |"
        else:
            yield f"| `{item.name}` | {type_name(hint)} | {shown(value)} | {text} |"


def _changed(cls: Any, values: dict[str, Any]) -> str:
    """Where a command's block differs from the block's own defaults."""
    own = {item.name: schema_default(item) for item in fields(cls)}
    return ", ".join(f"`{key}={value}`" for key, value in values.items() if value != own[key])


def table(lines: Iterator[str]) -> str:
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *lines])


def groups() -> Iterator[str]:
    """One row per file of a group, with the first comment of the file and its values."""
    yield "| choice | sets | note |\n|---|---|---|"
    for path in sorted(conf_dir().glob("*/*.yaml")):
        if path.parent.name == GROUP:
            continue
        text = path.read_text(encoding="utf-8")
        note = " ".join(
            line[1:].strip() for line in text.splitlines() if line.startswith("# ") and "@package" not in line
        )
        values = yaml.safe_load(text)
        sets = ", ".join(
            f"`{key}: {value}`" for key, value in values.items() if not isinstance(value, dict) or not value
        )
        yield f"| `{path.parent.name}={path.stem}` | {sets or 'see the file'} | {note} |"


def recipes() -> Iterator[str]:
    """One row per recipe, with the first sentence of its file."""
    yield "| choice | command | what another system does |\n|---|---|---|"
    for path in sorted((conf_dir() / GROUP).glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        comments = [line[1:].strip() for line in lines if line.startswith("#") and "@package" not in line]
        note = re.split(r"(?<=\w\w[.)])\s+(?=[A-Z])", " ".join(comments).partition("  ")[0])[0]
        yield f"| `recipe={path.stem}` | `{command_of(path.stem)}` | {note} |"


def blocks() -> list[type]:
    """Every nested block of the commands, in the order in which they appear, each followed by those within it."""

    def within(cls: type) -> Iterator[type]:
        for hint in get_type_hints(cls).values():
            if is_dataclass(hint) and isinstance(hint, type):
                yield hint
                yield from within(hint)

    return list(dict.fromkeys(hint for cls in SCHEMAS.values() for hint in within(cls)))


def reward_terms() -> Iterator[str]:
    """One section per registered term of a reward: what it computes, and its options."""
    yield from ("### RewardTermConfig\n", f"{inspect.getdoc(RewardTermConfig)}\n", option_table(RewardTermConfig))
    yield "\n## Reward terms\n\nOptions stand under `reward.terms.LABEL.options`. docs/rewards.md has the formulas."
    for name, term in sorted(registered().items()):
        about = " ".join((inspect.getdoc(term) or "").partition("\n\n")[0].split())
        yield from (f"\n### {name}\n", f"{about}\n", option_table(options_type(term)))


def option_table(cls: type) -> str:
    """The table of a dataclass by its own defaults, or a line that there is nothing to set."""
    defaults = {item.name: schema_default(item) for item in fields(cls)}
    return table(rows(cls, defaults)) if defaults else "No options."


def page() -> str:
    """The whole page."""
    parts = [INTRO, "## Groups\n", *groups(), RECIPES, *recipes(), "\n## Commands\n"]
    for name in COMMANDS:
        cls = SCHEMAS[name]
        defaults = yaml.safe_load(describe(name))
        parts += [f"### {name}\n", f"{COMMANDS[name].about[0].upper()}{COMMANDS[name].about[1:]}.\n"]
        parts += [table(rows(cls, defaults)), ""]
    parts.append("## Blocks\n")
    for cls in blocks():
        defaults = {item.name: schema_default(item) for item in fields(cls)}
        about = (inspect.getdoc(cls) or "").partition("\n\n")[0]
        parts += [f"### {cls.__name__}\n", f"{about}\n", table(rows(cls, defaults)), ""]
    parts += reward_terms()
    return "\n".join(parts).rstrip() + "\n"


def check_meanings() -> None:
    """No entry of `MEANINGS` outlives its key."""
    every = {
        base.__name__: base for cls in [*SCHEMAS.values(), *blocks()] for base in cls.__mro__ if is_dataclass(base)
    }
    for name, keys in MEANINGS.items():
        gone = set(keys) - {item.name for item in fields(every[name])} if name in every else {"the class itself"}
        if gone:
            raise SystemExit(f"MEANINGS has {name}: {', '.join(sorted(gone))}, which the schema has not")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 when the page is out of date; write nothing")
    check = parser.parse_args().check
    check_meanings()
    text = page()
    if check:
        current = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text
        if not current:
            print(f"{PAGE} is out of date: run `python tools/make_config_docs.py`", file=sys.stderr)
        return 0 if current else 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
