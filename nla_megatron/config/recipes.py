"""Recipes: what another system does by default, said in our keys. Files of `conf/recipe/`, each for one command.

A recipe comes after the groups, whose values it changes. The command line comes after the recipe: a key there wins, and
so does what the file of a group chosen there sets.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from nla_megatron.errors import ConfigError

GROUP = "recipe"
_COMMAND_BY_END = {"_sft_av": "sft", "_sft_ar": "sft", "_build": "build", "_extract": "extract"}
_CHOICE = re.compile(r"\+*(\w+)=(\w+)")


def command_of(recipe: str) -> str:
    """Whose recipe it is: its name ends in it, and names without such an end are of `rl`."""
    return next((command for end, command in _COMMAND_BY_END.items() if recipe.endswith(end)), "rl")


def recipes_of(command: str, conf: Path) -> list[str]:
    """The recipes of a command, by name."""
    return sorted(path.stem for path in (conf / GROUP).glob("*.yaml") if command_of(path.stem) == command)


def chosen_recipe(command: str, overrides: Sequence[str], conf: Path) -> str | None:
    """Which recipe the overrides name; None for none.

    Raises:
        ConfigError: there is no such recipe, or it is another command's.
    """
    name = _choices(overrides).get(GROUP, "null")
    fitting = recipes_of(command, conf)
    if name in fitting:
        return name
    if name == "null":
        return None
    expected = f"a recipe of `{command}`: {', '.join(fitting)}" if fitting else f"no recipe: `{command}` has none"
    if (conf / GROUP / f"{name}.yaml").is_file():
        owner = command_of(name)
        raise ConfigError(
            f"recipe={name}, a recipe of `{owner}`, with `{command}`", expected,
            f"run `nla-megatron {owner} recipe={name}`, or choose another",
        )  # fmt: skip
    near = difflib.get_close_matches(name, fitting, n=1)
    raise ConfigError(f"recipe={name}", expected, f"did you mean {near[0]}?" if near else "drop it, or choose another")


def without_recipe(overrides: Sequence[str]) -> list[str]:
    """The other overrides."""
    return [one for one in overrides if not re.match(rf"\+*{GROUP}=", one)]


def let_groups_win(
    composed: dict[str, Any], plain: Mapping[str, Any], overrides: Sequence[str], conf: Path
) -> dict[str, Any]:
    """`composed` with what the groups of the command line set, where a recipe had changed it.

    Args:
        composed: with the recipe; changed in place.
        plain: the same without it.
    """
    for group, option in _choices(overrides).items():
        path = conf / group / f"{option}.yaml"
        if group != GROUP and path.is_file():
            for key in yaml.safe_load(path.read_text(encoding="utf-8")):
                composed[group][key] = plain[group][key]
    return composed


def _choices(overrides: Sequence[str]) -> dict[str, str]:
    """Group -> option, for all overrides that could be choices."""
    return {found[1]: found[2] for one in overrides if (found := _CHOICE.fullmatch(one.strip()))}
