"""docs/systems.md names, for every feature, tests that are there, or says what is not."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "systems.md"
SYSTEMS = ["EasyNLA", "verl-NLA", "verl-SAE", "Hackable GRPO", "NanoRL"]
_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def rows() -> list[list[str]]:
    """Feature, place, tests; the heading of each table left out."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [row for row in cells if row[0] != "feature"]


@cache
def functions(path: str) -> frozenset[str]:
    """The test functions of a file; none where there is no such file."""
    file = ROOT / path
    if not file.is_file():
        return frozenset()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_every_test_that_the_page_names_is_there() -> None:
    named = [found.groups() for row in rows() for found in _TEST.finditer(row[2])]
    assert len(named) > 100
    assert [f"{path}::{name}" for path, name in named if name not in functions(path)] == []


def test_every_feature_has_a_test_or_a_reason() -> None:
    for feature, place, tests in rows():
        assert _TEST.search(tests) or re.search(r"not yet: \S+", tests), feature
        assert place != "—" or "not yet: " in tests, feature


def test_all_five_systems_are_there() -> None:
    headings = [line[3:] for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("## ")]
    assert headings == SYSTEMS
