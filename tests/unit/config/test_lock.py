"""One command at a time writes a directory: who it is is told, and a dead one is no obstacle."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import resource
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from nla_megatron.config.lock import Lock, Owner
from nla_megatron.errors import DiskFull, RunDirectoryError

FORK = multiprocessing.get_context("fork")
NAME = ".lock"


def _hold(directory: Path, ready: Any) -> None:
    lock = Lock(directory, NAME)
    lock.take()
    ready.set()
    signal.pause()


@contextmanager
def owner_of(directory: Path) -> Iterator[Any]:
    """Another process that owns the directory, until it is killed."""
    ready = FORK.Event()
    child = FORK.Process(target=_hold, args=(directory, ready))
    child.start()
    assert ready.wait(60)
    try:
        yield child
    finally:
        child.kill()
        child.join()


def record(directory: Path, owner: Owner) -> None:
    (directory / NAME).write_text(json.dumps(asdict(owner)))


def without_kernel_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has none, as NFS without its lock daemon."""

    def refuse(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)


@pytest.mark.parametrize("kernel", [True, False], ids=["with the kernel's locks", "on a file system without locks"])
def test_a_second_owner_is_refused_by_the_name_of_the_first_and_a_killed_one_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: bool
) -> None:
    if not kernel:
        without_kernel_locks(monkeypatch)
    lock = Lock(tmp_path, NAME)
    with owner_of(tmp_path) as first:
        for attempt in (lock.refuse_owned, lock.take):
            with pytest.raises(RunDirectoryError, match=rf"process {first.pid} on {os.uname().nodename} since") as told:
                attempt()
            assert str(tmp_path) in told.value.found
        os.kill(first.pid, signal.SIGKILL)
        first.join()
        lock.refuse_owned()
        lock.take()
    assert json.loads((tmp_path / NAME).read_text())["process"] == os.getpid()
    lock.release()
    assert (tmp_path / NAME).read_bytes() == b""


def test_a_later_process_with_the_number_of_a_dead_owner_is_not_taken_for_it(tmp_path: Path) -> None:
    parent = os.getppid()
    boot, ticks = Owner.here().start.split()
    record(tmp_path, replace(Owner.here(), process=parent, start=f"{boot} {int(ticks) + 10**9}"))
    Lock(tmp_path, NAME).refuse_owned()
    record(tmp_path, replace(Owner.here(), process=parent, start=f"another-boot {ticks}"))
    Lock(tmp_path, NAME).refuse_owned()


def test_an_owner_on_another_host_is_refused_with_the_way_to_take_over(tmp_path: Path) -> None:
    record(tmp_path, replace(Owner.here(), host="node17", process=4711))
    with pytest.raises(RunDirectoryError, match="process 4711 on node17") as told:
        Lock(tmp_path, NAME).take()
    assert f"remove {tmp_path / NAME}" in told.value.remedy
    (tmp_path / NAME).unlink()
    Lock(tmp_path, NAME).take()


def slurm(folder: Path, answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `squeue` that says `answer` of every job."""
    program = folder / "squeue"
    program.write_text(f"#!/bin/sh\n{answer}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ("echo RUNNING", True), ("echo COMPLETING", True), ("echo 'cannot connect' >&2; exit 1", True),
        ("echo TIMEOUT", False), ("echo PENDING", False), ("exit 0", False),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", False),
    ],
)  # fmt: skip
def test_of_a_job_on_another_host_slurm_says_whether_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, refused: bool
) -> None:
    slurm(tmp_path, answer, monkeypatch)
    record(tmp_path, replace(Owner.here(), host="node17", job="99"))
    if refused:
        with pytest.raises(RunDirectoryError, match="the job 99 on node17"):
            Lock(tmp_path, NAME).take()
    else:
        Lock(tmp_path, NAME).take()


def test_a_job_that_slurm_has_started_again_follows_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm(tmp_path, "echo RUNNING", monkeypatch)
    monkeypatch.setenv("SLURM_JOB_ID", "99")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    record(tmp_path, replace(Owner.here(), host="node17", restart=1))
    with pytest.raises(RunDirectoryError, match="node17"):
        Lock(tmp_path, NAME).take()
    record(tmp_path, replace(Owner.here(), host="node17", restart=0))
    Lock(tmp_path, NAME).take()


def test_a_disk_that_takes_no_record_is_named_with_the_file(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        with pytest.raises(DiskFull, match=r"\.lock"):
            Lock(tmp_path, ".lock").take()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    Lock(tmp_path, ".lock").take()


@pytest.mark.parametrize(
    "content", [b"", b'{"host": "node', b"[]", b"\xff\xfe"], ids=["empty", "half", "a list", "bytes"]
)
def test_half_a_record_is_nobodys(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content)
    Lock(tmp_path, NAME).take()
