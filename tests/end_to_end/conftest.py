"""One toy run of the whole demo, shared by every end-to-end test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.ranks import command_line
from tests.support.shared import made_once


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of `nla-megatron demo scale=toy`."""

    def make(directory: Path) -> None:
        done = command_line("demo", f"out={directory / 'toy'}", "scale=toy", timeout=800)
        assert done.returncode == 0, done.stdout + done.stderr

    return made_once(tmp_path_factory, "demo", make) / "toy"
