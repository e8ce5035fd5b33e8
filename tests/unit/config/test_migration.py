"""docs/migration.md says what recipes set: every key of its tables is one of ours, every value is what composes."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, is_dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import yaml

from nla_megatron.config.compose import conf_dir
from tests.support.recipes import FREE, composed_recipe

PAGE = Path(__file__).resolve().parents[3] / "docs" / "migration.md"
HEADER = ["their option", "ours", "theirs", "note"]
_SECTION = re.compile(r"### `(\w+)`(?:, `recipe=(\w+)`)?")
_CODE = re.compile(r"`([^`]+)`")
_EXPONENT = re.compile(r"-?\d+(\.\d+)?e-?\d+")


@dataclass(frozen=True)
class Row:
    """One option of another system. `ours`: `key` or `key=value`; empty where there is none."""

    command: str
    recipe: str | None
    option: str
    ours: tuple[str, ...]
    theirs: str
    note: str

    def __str__(self) -> str:
        return f"{self.recipe or self.command}: {self.option}"

    @property
    def section(self) -> tuple[str, str | None]:
        return self.command, self.recipe


def rows() -> list[Row]:
    found, command, recipe = [], "", None
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if section := _SECTION.fullmatch(line):
            command, recipe = section[1], section[2]
        elif line.startswith("## "):
            command = ""
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("| ") else []
        if command and cells and cells != HEADER:
            assert len(cells) == len(HEADER), f"a row of {len(cells)} cells: {line}"
            option, ours, theirs, note = cells
            found.append(Row(command, recipe, option, tuple(_CODE.findall(ours)), theirs, note))
    return found


ROWS = rows()
SECTIONS = list(dict.fromkeys(row.section for row in ROWS))


def typed(text: str) -> Any:
    """A value as it is typed on the command line."""
    return float(text) if _EXPONENT.fullmatch(text) else yaml.safe_load(text)


def step_in(config: Any, part: str) -> Any:
    if isinstance(config, list):
        return config[int(part)]
    return config[part] if isinstance(config, dict) else getattr(config, part)


def at(config: Any, key: str) -> Any:
    return reduce(step_in, key.split("."), config)


def knows(config: Any, key: str) -> bool:
    """Whether a key has a meaning: the schema has it, or who reads the free options does."""
    *path, last = key.split(".")
    if key.startswith("reward.terms."):
        label = path[2] if len(path) > 2 else last
        part = config.reward.parts.get(label)
        if len(path) < 4:
            return bool(part) or FREE.term_options(label) is not None
        return last in names(FREE.term_options(part.term or label if part else label))
    if key.startswith("task.options."):
        if len(path) > 2:
            return last in names(FREE.inner_options(config.task.name)[path[2]])
        kind = FREE.task_options(config.task.name)
        return kind is not None and last in names(kind)
    if key.startswith("provider.options."):
        return last in names(FREE.provider_options())
    parent = at(config, ".".join(path)) if path else config
    return last in names(type(parent)) if is_dataclass(parent) else last in parent


def names(kind: Any) -> set[str]:
    return {item.name for item in fields(kind)}


def is_group(key: str) -> bool:
    return "." not in key and (conf_dir() / key).is_dir()


def test_the_page_has_a_table_for_every_recipe() -> None:
    assert {row.recipe for row in ROWS if row.recipe} == {path.stem for path in (conf_dir() / "recipe").glob("*.yaml")}
    assert len(ROWS) > 300


def differences(row: Row) -> list[str]:
    """What a row says that the recipe does not compose to, and keys that are none."""
    config, found = composed_recipe(row.command, row.recipe), []
    for cell in row.ours:
        key, given, value = cell.partition("=")
        if is_group(key):
            continue
        if not row.theirs:
            found += [] if knows(config, key) else [f"{row}: {key} is no key of ours"]
        elif at(config, key) != (expected := typed(value if given else _CODE.findall(row.theirs)[0])):
            found.append(f"{row}: {key} is {at(config, key)!r} and not {expected!r}")
    return found


@pytest.mark.parametrize("section", SECTIONS, ids=str)
def test_rows_say_what_the_recipe_composes_to(section: tuple[str, str | None]) -> None:
    assert [found for row in ROWS if row.section == section for found in differences(row)] == []


@pytest.mark.parametrize("section", SECTIONS, ids=str)
def test_what_rows_say_to_set_can_be_set(section: tuple[str, str | None]) -> None:
    cells = [cell for row in ROWS if row.section == section for cell in row.ours if "=" in cell]
    values = dict(cell.split("=", 1) for cell in cells if not is_group(cell.partition("=")[0]) and ".0." not in cell)
    config = composed_recipe(*section, *(f"{key}={value}" for key, value in values.items()))
    assert {key: at(config, key) for key in values} == {key: typed(value) for key, value in values.items()}
    for choice in {cell for cell in cells if is_group(cell.partition("=")[0])}:
        composed_recipe(*section, choice)


def test_an_option_without_a_counterpart_has_a_reason() -> None:
    assert [str(row) for row in ROWS if not row.ours and not row.note] == []


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ("batch_size", "`65`", "batch_size is 64 and not 65"),
        ("batch_size=65", "`x`", "batch_size is 64 and not 65"),
        ("batch_sise", "", "batch_sise is no key of ours"),
        ("reward.terms.reconstruction.options.transfrom=log", "", "transfrom is no key of ours"),
    ],
)
def test_a_row_that_is_wrong_would_be_seen(ours: str, theirs: str, said: str) -> None:
    (found,) = differences(Row("rl", "paper", "`--option`", (ours,), theirs, ""))
    assert said in found
