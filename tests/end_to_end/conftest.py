"""One toy run of the whole demo, shared by every end-to-end test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.ranks import command_line


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of `nla-megatron demo scale=toy`."""
    out = tmp_path_factory.mktemp("demo") / "toy"
    done = command_line("demo", f"out={out}", "scale=toy", timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    return out
