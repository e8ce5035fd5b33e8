"""What several rooms' tests share: a tiny model's directory and tables for it, made once and only read."""

from __future__ import annotations

import gc
import os

# Before torch is imported: a worker of pytest-xdist has one core, and its neighbours the others.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.support.covering import WHOLE
from tests.support.tiny import tiny_config, tiny_tables

# Timing is not what properties are about; a machine may be busy.
settings.register_profile("suite", deadline=None, max_examples=50)
settings.load_profile("suite")


FIRST = (
    # What it begins with, the toy run, others wait for: they come later.
    "end_to_end/test_rl_layouts", "distributed/test_interventions",
    # Slow ones.
    "end_to_end/test_sweep", "distributed/test_slurm", "distributed/test_algorithms", "end_to_end/test_nla_variants",
    "end_to_end/test_rl_algorithms", "end_to_end/test_lora", "end_to_end/test_rl_sae",
    "distributed/test_reshard", "end_to_end/test_rl_tasks", "unit/training/test_sft", "end_to_end/test_resume",
    "distributed/test_strengths", "unit/conversion/test_convert", "distributed/test_adapter",
    "distributed/test_layouts", "distributed/test_engine",
)  # fmt: skip
"""Files in the order in which workers take them: long ones first. All others follow."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="whole products of layouts and the like, not only pairs")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--whole"):
        os.environ[WHOLE] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that no worker begins one when the others are through."""
    place = {f"tests/{file}.py": number for number, file in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(place)))


def pytest_collection_finish() -> None:
    """Modules and tests stay until the end: the garbage collector need not go through them each time."""
    gc.freeze()


def pytest_report_header() -> str:
    """What ran the tests, for whoever sees them fail elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    known = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    wide = {"avx2", "avx512f", "avx512_bf16", "amx_bf16"} & set(known.get("flags", "").split())
    held = f", held to {os.environ['HELD_TO']}" if "HELD_TO" in os.environ else ""
    return f"processor: {known.get('model name', 'unknown')}, {' '.join(sorted(wide)) or 'no AVX2'}{held}"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Where the time went: seconds of set-up, tests and tear-down of each folder, and of the slowest files.

    Those of several workers are added up.
    """
    folders, files = Counter[str](), Counter[str]()
    for report in (one for kind in terminalreporter.stats.values() for one in kind if hasattr(one, "duration")):
        file = report.nodeid.partition("::")[0]
        depth = 3 if file.startswith("tests/unit/") and file.count("/") > 2 else 2
        folders["/".join(file.split("/")[:depth])] += report.duration
        files[file] += report.duration
    terminalreporter.section("seconds")
    for found, most in ((folders, None), (files, 10)):
        for name, seconds in found.most_common(most):
            if seconds >= 1:
                terminalreporter.write_line(f"{seconds:7.0f}  {name}")
        terminalreporter.write_line("")


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with tokenizer and config.json, without weights."""
    return tiny_config(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> dict[str, Path]:
    """A table of every stage for `model_dir`, by stage."""
    return tiny_tables(tmp_path_factory.mktemp("tables"), model_dir)
