"""What workers share is made once, and what could not be made is not tried again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.shared import made_once


@pytest.fixture(params=["alone", "workers"])
def factories(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Where pytest puts files: all of a process alone, or each of two workers its own beside the other."""
    if request.param == "alone":
        monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
        return [SimpleNamespace(getbasetemp=lambda: tmp_path)] * 2
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    places = [tmp_path / "popen-gw0", tmp_path / "popen-gw1"]
    return [SimpleNamespace(getbasetemp=lambda place=place: place) for place in places]


def test_all_who_ask_at_once_read_what_one_of_them_made(factories: list[Any]) -> None:
    together, made = Barrier(2), []

    def make(directory: Path) -> None:
        made.append(directory)
        (directory / "file").write_text("whole")

    def ask(factory: Any) -> str:
        together.wait(60)
        return (made_once(factory, "demo", make) / "file").read_text()

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(ask, factories)) == ["whole", "whole"]
    assert len(made) == 1


def test_what_could_not_be_made_fails_all_with_the_first_reason(factories: list[Any]) -> None:
    tries = []

    def make(directory: Path) -> None:
        tries.append(directory)
        raise AssertionError("rank 1 is gone")

    for factory in factories:
        with pytest.raises(AssertionError, match="rank 1 is gone"):
            made_once(factory, "demo", make)
    assert len(tries) == 1
