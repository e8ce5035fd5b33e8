"""The launcher ends what it started, whatever ends first, and says so with its exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from nla_megatron.launch.local import launch
from nla_megatron.parallel import started
from tests.support.ranks import Child, start, wait_until_gone

FOREVER = 600


def rank_1_leaves(arguments: Sequence[str]) -> int:
    if started.rank() == 1:
        return 3
    time.sleep(FOREVER)
    return 0


def all_stay(arguments: Sequence[str]) -> int:
    helper = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({FOREVER})"])
    (Path(arguments[0]) / f"{started.rank()}.helper").write_text(str(helper.pid))
    (Path(arguments[0]) / str(started.rank())).write_text(str(os.getpid()))
    time.sleep(FOREVER)
    return 0


def all_write(arguments: Sequence[str]) -> int:
    assert started.world_size() == 2
    # In one piece with its line's end, which another rank's line may come before otherwise.
    os.write(sys.stdout.fileno(), f"rank {started.rank()} of {os.environ['WORLD_SIZE']}: {arguments[0]}\n".encode())
    return 0


def two_ranks(entry: Callable[[Sequence[str]], int], argument: Path) -> Child:
    return start(entry.__name__, str(argument), entry=launched)


def launched(arguments: Sequence[str]) -> int:
    # A suite that a script started in the background has SIGINT ignored, and so have its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return launch(globals()[arguments[0]], arguments[1:], 2, [])


def pids(directory: Path) -> list[int]:
    """Of both ranks and their helpers, once all are there."""
    names = ("0", "1", "0.helper", "1.helper")
    deadline = time.monotonic() + 60
    while not all((directory / name).exists() and (directory / name).read_text() for name in names):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [int((directory / name).read_text()) for name in names]


def test_every_rank_runs_with_its_number_and_the_arguments(tmp_path: Path) -> None:
    done = two_ranks(all_write, tmp_path).wait(60)
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == [f"rank {rank} of 2: {tmp_path}" for rank in (0, 1)]


def test_the_exit_code_is_that_of_the_rank_that_failed(tmp_path: Path) -> None:
    done = two_ranks(rank_1_leaves, tmp_path).wait(60)
    assert done.returncode == 3 and done.stderr == ""


def test_a_killed_rank_ends_the_others_and_every_helper(tmp_path: Path) -> None:
    child = two_ranks(all_stay, tmp_path)
    everybody = pids(tmp_path)
    os.kill(everybody[1], signal.SIGKILL)
    done = child.wait(60)
    assert done.returncode == 128 + signal.SIGKILL
    assert "rank 1 was ended by SIGKILL" in done.stderr
    wait_until_gone(everybody)


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_launcher_ends_its_ranks(tmp_path: Path, stop: signal.Signals) -> None:
    child = two_ranks(all_stay, tmp_path)
    everybody = pids(tmp_path)
    assert child.process.pid is not None
    os.kill(child.process.pid, stop)
    assert child.wait(60).returncode != 0
    wait_until_gone(everybody)


def launched_in_the_background(arguments: Sequence[str]) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return launch(globals()[arguments[0]], arguments[1:], 2, [])


def test_a_killed_launcher_leaves_no_rank_behind(tmp_path: Path) -> None:
    """As a script starts it in the background, where SIGINT is ignored."""
    child = start("all_stay", str(tmp_path), entry=launched_in_the_background)
    ranks, helpers = pids(tmp_path)[:2], pids(tmp_path)[2:]
    assert child.process.pid is not None
    os.kill(child.process.pid, signal.SIGKILL)
    try:
        wait_until_gone(ranks)
    finally:
        for helper in helpers:  # a rank that is killed cannot end what it has started
            os.kill(helper, signal.SIGKILL)
