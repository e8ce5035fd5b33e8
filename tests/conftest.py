"""What several rooms' tests share: a tiny model's directory and tables for it, made once and only read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.tiny import tiny_config, tiny_tables

# Timing is not what properties are about; a machine may be busy.
settings.register_profile("suite", deadline=None, max_examples=50)
settings.load_profile("suite")


def pytest_report_header() -> str:
    """What ran the tests, for whoever sees them fail elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    known = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    wide = {"avx2", "avx512f", "avx512_bf16", "amx_bf16"} & set(known.get("flags", "").split())
    held = f", held to {os.environ['HELD_TO']}" if "HELD_TO" in os.environ else ""
    return f"processor: {known.get('model name', 'unknown')}, {' '.join(sorted(wide)) or 'no AVX2'}{held}"


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with tokenizer and config.json, without weights."""
    return tiny_config(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> dict[str, Path]:
    """A table of every stage for `model_dir`, by stage."""
    return tiny_tables(tmp_path_factory.mktemp("tables"), model_dir)
