"""What several processes of one test run read, made by the first that needs it."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The directory `name` of this test run as `make` left it, whichever worker of pytest-xdist ran it.

    The others wait. What failed is not tried again: each fails with what the first was told.
    """
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    directory, done, failed = (base / f"{name}{end}" for end in ("", ".done", ".failed"))
    with FileLock(base / f"{name}.lock"):
        assert not failed.exists(), failed.read_text()
        if not done.exists():
            directory.mkdir()
            try:
                make(directory)
            except BaseException:
                failed.write_text(f"{name} could not be made:\n{traceback.format_exc()}")
                raise
            done.touch()
    return directory
