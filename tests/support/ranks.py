"""Run commands and worker scripts as processes of their own, forked from one that has paid for the imports."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nla_megatron.cli import main
from nla_megatron.launch.local import Entry, command_process, launch

ROOT = Path(__file__).resolve().parents[2]
_RESHARD = ("nla_megatron.rollout.preload", "nla_megatron.reshard.resharder")
PRELOADS = {f"reshard{kind}_worker": _RESHARD for kind in ("", "_engine", "_failing", "_apart")}
"""Modules that a worker's ranks share, imported before they are forked."""


def environment(**extra: str) -> dict[str, str]:
    """The environment of a child that is nobody's rank yet."""
    inherited = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    }
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "CI": "1", **extra}


@dataclass(frozen=True)
class Child:
    """A running process and the files that its output goes to."""

    process: multiprocessing.Process
    stdout: Path
    stderr: Path

    def wait(self, timeout: float) -> subprocess.CompletedProcess[str]:
        """Its end; a child that does not end in `timeout` seconds fails the test, with what it said."""
        self.process.join(timeout)
        late = self.process.is_alive()
        if late:
            self.process.terminate()
            self.process.join(10)
            self.process.kill()
        out, err = self.stdout.read_text(), self.stderr.read_text()
        assert not late, f"still running after {timeout} s\n{out[-3000:]}{err[-6000:]}"
        assert self.process.exitcode is not None
        return subprocess.CompletedProcess([], self.process.exitcode, out, err)


def start(*arguments: str, entry: Entry = main, **extra: str) -> Child:
    """Start `nla-megatron arguments…` as a process with files for its output."""
    directory = Path(tempfile.mkdtemp())
    child = Child(
        command_process(_Redirected(entry, environment(**extra), directory), arguments),
        directory / "stdout", directory / "stderr",
    )  # fmt: skip
    for path in (child.stdout, child.stderr):
        path.touch()
    child.process.start()
    return child


def command(*arguments: str, timeout: float = 500, **extra: str) -> subprocess.CompletedProcess[str]:
    """`nla-megatron arguments…` to its end."""
    return start(*arguments, **extra).wait(timeout)


def command_line(*arguments: str, timeout: float = 500, **extra: str) -> subprocess.CompletedProcess[str]:
    """The same started afresh, as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "nla_megatron", *arguments],
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
    )


def torchrun(worker: str, ranks: int, *arguments: str, timeout: float = 500) -> Any:
    """Run `tests/distributed/{worker}.py RESULT arguments…` on `ranks` processes; returns the JSON of rank 0."""
    result = Path(arguments[0]) / f"{worker}.json"
    done = run_ranks(worker, ranks, str(result), *arguments, timeout=timeout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-8000:]
    return json.loads(result.read_text())


def run_ranks(worker: str, ranks: int, *arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
    """`tests/distributed/{worker}.py arguments…` on `ranks` processes to its end, whatever that is."""
    return start_ranks(worker, ranks, *arguments).wait(timeout)


def start_ranks(worker: str, ranks: int, *arguments: str) -> Child:
    """The same, only begun."""
    script = str(ROOT / "tests" / "distributed" / f"{worker}.py")
    return start(str(ranks), script, *arguments, entry=_on_ranks)


def wait_for(path: Path, child: Child, seconds: float = 200) -> None:
    """Returns when the child has written the file; one that ends before it does fails the test."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert child.process.is_alive() and time.monotonic() < deadline, child.stderr.read_text()[-6000:]
        time.sleep(0.02)


def wait_until_gone(pids: Iterable[int], seconds: float = 60) -> None:
    """Returns when none of the processes runs: a killed one takes a moment to end, longer on a busy machine."""
    deadline = time.monotonic() + seconds
    while left := [pid for pid in pids if _runs(pid)]:
        assert time.monotonic() < deadline, f"processes {left} still run"
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):  # the latter where it ends between the opening and the reading
        return False


@dataclass(frozen=True)
class _Redirected:
    """An entry in another environment whose output goes to files, also that of the processes it starts."""

    entry: Entry
    environment: dict[str, str]
    directory: Path

    def __call__(self, arguments: Sequence[str]) -> int:
        os.chdir(ROOT)
        os.environ.clear()
        os.environ.update(self.environment)
        for number, name in ((1, "stdout"), (2, "stderr")):
            with (self.directory / name).open("ab") as file:
                os.dup2(file.fileno(), number)
        return self.entry(arguments)


def _on_ranks(arguments: Sequence[str]) -> int:
    return launch(_run_script, arguments[1:], int(arguments[0]), PRELOADS.get(Path(arguments[1]).stem, ()))


def _run_script(arguments: Sequence[str]) -> int:
    sys.argv = list(arguments)
    runpy.run_path(arguments[0], run_name="__main__")
    return 0
