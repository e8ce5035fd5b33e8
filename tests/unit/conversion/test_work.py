"""One command at a time makes a directory, and nothing that is there is taken for its own or overwritten."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nla_megatron.conversion.merge import new_directory
from nla_megatron.conversion.work import Work
from nla_megatron.disk import room_on
from nla_megatron.errors import RunDirectoryError

PLAN = {"direction": "import", "source": "here"}
FORK = multiprocessing.get_context("fork")


def _at_work(work: Work, step: Callable[[Work], None], ready: Any, leave: Any) -> None:
    step(work)
    ready.set()
    leave.wait(60)


def _joined_and_done(work: Work) -> None:
    work.join()
    work.flush()


@contextmanager
def another_process(work: Work, step: Callable[[Work], None]) -> Iterator[None]:
    """Somebody else who has made a step of a conversion and is still there."""
    ready, leave = FORK.Event(), FORK.Event()
    child = FORK.Process(target=_at_work, args=(work, step, ready, leave))
    child.start()
    assert ready.wait(60)
    try:
        yield
    finally:
        leave.set()
        child.join()


def made(out: Path) -> Work:
    work = Work(out, PLAN, durable=False)
    work.begin()
    return work


def published(out: Path) -> None:
    work = made(out)
    (work.partial / "conversion.json").write_text('{"options": {"direction": "import", "source": "here"}}')
    work.publish()


@pytest.mark.parametrize("step", [Work.begin, Work.join], ids=["its first process", "a worker that outlived it"])
def test_a_second_command_waits_for_every_process_of_the_first(tmp_path: Path, step: Callable[[Work], None]) -> None:
    (tmp_path / "out.partial" / "journal").mkdir(parents=True)
    with another_process(Work(tmp_path / "out", PLAN), step):
        with pytest.raises(RunDirectoryError, match=r"out\.partial is being written by "):
            made(tmp_path / "out")
    made(tmp_path / "out").publish()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_worker_lets_go_when_it_has_written_its_files(tmp_path: Path) -> None:
    (tmp_path / "out.partial" / "journal").mkdir(parents=True)
    with another_process(Work(tmp_path / "out", PLAN), _joined_and_done):
        made(tmp_path / "out")


def test_what_another_process_has_finished_meanwhile_is_left_as_it_is(tmp_path: Path) -> None:
    late = Work(tmp_path / "out", PLAN)
    assert not late.check()
    published(tmp_path / "out")
    before = (tmp_path / "out" / "conversion.json").stat().st_mtime_ns
    with pytest.raises(RunDirectoryError, match="another process"):
        late.begin()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "conversion.json").stat().st_mtime_ns == before and late.check()


def test_files_that_no_conversion_began_never_become_part_of_one(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "model.safetensors").write_text("of something else")
    with pytest.raises(RunDirectoryError, match="which no conversion began"):
        Work(tmp_path / "out", PLAN).check()
    assert (tmp_path / "out.partial" / "model.safetensors").read_text() == "of something else"


def test_a_conversion_killed_before_its_plan_was_written_goes_on(tmp_path: Path) -> None:
    (tmp_path / "out.partial" / "journal").mkdir(parents=True)
    (tmp_path / "out.partial" / "journal" / "lock").touch()
    assert not Work(tmp_path / "out", PLAN).check()
    published(tmp_path / "out")


def test_a_place_where_nothing_can_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunDirectoryError, match="file, where nothing can be written"):
        Work(tmp_path / "file" / "out", PLAN).check_room(0)
    with pytest.raises(RunDirectoryError, match="Not a directory"), room_on(tmp_path):
        (tmp_path / "file" / "out").mkdir()


def test_a_new_directory_is_one_commands_and_takes_over_nothing_else(tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    with new_directory(tmp_path / "out"):
        assert partial.is_dir()
    (tmp_path / "out").rmdir()
    partial.mkdir()
    (partial / ".lock").touch()
    (partial / "rest of a killed one").touch()
    with new_directory(tmp_path / "out") as directory:
        (directory / "new").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]
    made(tmp_path / "other")
    with pytest.raises(RunDirectoryError, match="another command"), new_directory(tmp_path / "other"):
        pass
    assert (tmp_path / "other.partial" / "journal" / "plan.json").is_file()
