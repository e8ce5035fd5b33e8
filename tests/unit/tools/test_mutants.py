"""The list of mutations stays true: each still applies, to code, and names tests that are there."""

from __future__ import annotations

import ast
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
TOOL: dict[str, Any] = runpy.run_path(str(ROOT / "tools" / "mutants.py"))
MUTATIONS = TOOL["MUTATIONS"]


def test_there_are_forty_mutations_or_more_with_names_of_their_own() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 40


@pytest.mark.parametrize("room", sorted({mutation.file.split("/")[0] for mutation in MUTATIONS}))
def test_each_mutation_changes_one_place_to_other_code_and_names_tests(room: str, tmp_path: Path) -> None:
    for mutation in (mutation for mutation in MUTATIONS if mutation.file.split("/")[0] == room):
        source = ROOT / "nla_megatron" / mutation.file
        copy = tmp_path / "nla_megatron" / mutation.file
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, copy)
        mutation.apply(tmp_path)
        assert ast.dump(ast.parse(copy.read_text())) != ast.dump(ast.parse(source.read_text())), mutation.name
        assert mutation.tests and all((ROOT / test).is_file() for test in mutation.tests), mutation.name
