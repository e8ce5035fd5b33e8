"""Imports only go down the floors, and the start of the package and of its command line is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "nla_megatron"
FLOORS = (
    ("types", "errors"),
    ("disk", "reading"),
    ("hub", "pretrained"),
    ("config", "contract", "geometry"),
    ("messages",),
    ("judging",),
    ("interventions", "rewards", "algorithms"),
    ("parallel",),
    ("models",),
    ("conversion",),
    ("reshard", "rollout"),
    ("tasks",),
    ("datagen", "evaluation", "training"),
    ("serving", "launch"),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
LIBRARIES = {
    "megatron": {"parallel", "models", "conversion", "reshard", "training"},
    "vllm": {"reshard", "rollout"},
}
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
HEAVY = ("torch", "transformers", "megatron", "vllm", "pyarrow", "hydra")


def room_of(file: Path) -> str:
    return file.parts[0].removesuffix(".py")


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, those inside functions and under TYPE_CHECKING included."""
    for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports relatively"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def test_every_file_stands_on_a_floor() -> None:
    assert {room_of(file) for file in FILES} - set(FLOOR) == {"__init__"}
    assert list(imports(Path("__init__.py"))) == []


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_only_go_down(file: Path) -> None:
    here, wrong = room_of(file), []
    for line, name in imports(file):
        library, _, rest = name.partition(".")
        room = rest.partition(".")[0]
        if library == "nla_megatron" and room != here and room in FLOOR and FLOOR[room] >= FLOOR[here]:
            wrong.append(f"{file}:{line} imports {room}, which is not below {here}")
        if library in LIBRARIES and here not in LIBRARIES[library]:
            wrong.append(f"{file}:{line} imports {library}, which {here} does not know")
    assert wrong == []


@pytest.mark.parametrize("module", ["nla_megatron", "nla_megatron.cli"])
def test_the_start_imports_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
