"""Many commands, several at a time: each a process with a log of its own, none of which stops the others."""

from __future__ import annotations

import importlib
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any

from nla_megatron.config.hub_keys import with_paths
from nla_megatron.config.schema import LauncherConfig
from nla_megatron.conversion.formats.config_keys import admitting
from nla_megatron.errors import ConfigError, NlaError
from nla_megatron.launch import commands
from nla_megatron.launch.local import PRELOAD, PRELOAD_TRAINING, command_process, interrupted_by_sigterm, launch

DONE, FAILED, QUEUED = "done", "failed", "queued"
_TOLD_LENGTH = 150
_STOP_SECONDS = 15.0


@dataclass(frozen=True)
class Job:
    """A command line without the program's name, the ranks it wants, and the file that its output is added to."""

    name: str
    argv: tuple[str, ...]
    ranks: int
    log: Path


@dataclass(frozen=True)
class Outcome:
    """How a job stands. `told` is why it failed, from its log; `seconds` is None where nobody has measured them."""

    name: str
    state: str
    exit_code: int | None = None
    seconds: float | None = None
    told: str = ""


Report = Callable[[Outcome], None]


def check_job(name: str, command: str, config: Any, ranks: int) -> Any:
    """What the command itself would find before it starts; returns its configuration, names of the hub as paths.

    Raises:
        NlaError: of the command's own class, with the job's name.
    """
    try:
        config = with_paths(command, config)
        with admitting(getattr(config, "allow_unknown_config", ())):
            importlib.import_module(commands.COMMANDS[command].module).check(config, ranks)
        return config
    except NlaError as error:
        raise type(error)(f"{error.found} ({name})", error.expected, error.remedy) from None


def check_launcher(jobs: Sequence[Job], at_once: int, launcher: LauncherConfig) -> None:
    """Raises ConfigError where the jobs cannot be run this way."""
    ranks = max((job.ranks for job in jobs), default=1)
    if launcher.name == "slurm":
        from nla_megatron.launch.slurm import check_slurm

        check_slurm(launcher, ranks)
        return
    devices = _devices()
    if devices and ranks * min(at_once, len(jobs)) > len(devices):
        raise ConfigError(
            f"jobs={at_once} of {ranks} ranks on {len(devices)} GPUs", f"at most {len(devices) // ranks} at a time",
            "lower jobs=, or the ranks of a job",
        )  # fmt: skip


def check_read(command: str, jobs: Sequence[tuple[Any, Sequence[str]]]) -> None:
    """Whether what was typed for jobs of a command is read by at least one of them.

    Args:
        jobs: of each its configuration, and the words that were typed for it.

    Raises:
        ConfigError: one that none of them reads.
    """
    idle = []
    for config, words in jobs:
        with admitting(getattr(config, "allow_unknown_config", ())):
            idle.append(commands.idle_words(command, config, words))
    for name, refusal in (idle[0] if idle else {}).items():
        if all(name in others for others in idle):
            raise refusal


def run_jobs(jobs: Sequence[Job], at_once: int, launcher: LauncherConfig, report: Report, folder: Path) -> None:
    """Run every job to its end, `at_once` at a time; `report` hears of each that ends, whichever way.

    Args:
        folder: where a launcher may keep its own files.
    """
    if launcher.name == "slurm":
        from nla_megatron.launch.slurm import run_on_slurm

        run_on_slurm(jobs, at_once, launcher, report, folder)
        return
    _run_here(jobs, at_once, report)


def run_alone(argv: Sequence[str]) -> int:
    """A command that nobody has started ranks for, to its end on this machine; the exit code.

    Even a single rank is started by `launch`, whose port stays taken from the moment it is chosen: two commands that
    begin together cannot choose the same one.
    """
    command = commands.COMMANDS[argv[0]]
    if not command.on_ranks:
        return commands.run(argv)
    return launch(commands.run, argv, commands.configured(argv[0], argv[1:]).ranks, commands.preloads(command))


def last_words(log: Path) -> str:
    """What a failed job has said: the last error named in its log, else the last line."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    named = [
        line for line in lines if re.match(r"[A-Za-z_.]+: ", line) and not line.startswith(("expected:", "to do:"))
    ]
    spoken = named or [line for line in lines if line.strip()]
    return spoken[-1].strip()[:_TOLD_LENGTH] if spoken else ""


def _run_here(jobs: Sequence[Job], at_once: int, report: Report) -> None:
    devices, waiting = _devices(), deque(jobs)
    ranks = max((job.ranks for job in jobs), default=1)
    slots = [devices[slot * ranks : (slot + 1) * ranks] for slot in range(min(at_once, len(jobs)))]
    running: dict[Any, _Running] = {}
    with interrupted_by_sigterm(), _ended(running):
        while waiting or running:
            while waiting and slots:
                started = _start(waiting.popleft(), slots.pop(0), min(at_once, len(jobs)))
                running[started.process.sentinel] = started
            for sentinel in connection.wait(list(running)):
                ended = running.pop(sentinel)
                ended.process.join()
                slots.insert(0, ended.devices)
                report(_outcome(ended))


@dataclass(frozen=True)
class _Running:
    job: Job
    process: Any
    devices: list[str]
    since: float


def _start(job: Job, devices: list[str], at_once: int) -> _Running:
    threads = max(1, (os.cpu_count() or 1) // (at_once * job.ranks))
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    preload = PRELOAD if commands.COMMANDS[job.argv[0]].samples else PRELOAD_TRAINING
    process = command_process(Logged(job.log, environment), job.argv, preload)
    process.start()
    return _Running(job, process, devices, time.monotonic())


def _outcome(ended: _Running) -> Outcome:
    code, seconds = ended.process.exitcode, time.monotonic() - ended.since
    return outcome_of(ended.job, 128 - code if code < 0 else code, seconds)


def outcome_of(job: Job, code: int | None, seconds: float | None) -> Outcome:
    """Of a job that has ended; `code` is None where it left without one."""
    if code == 0:
        return Outcome(job.name, DONE, 0, seconds)
    return Outcome(job.name, FAILED, code, seconds, last_words(job.log))


@contextmanager
def _ended(running: dict[Any, _Running]) -> Iterator[None]:
    """Whatever ends the caller ends what it has started; each command ends its own ranks."""
    try:
        yield
    finally:
        for one in running.values():
            one.process.terminate()
        deadline = time.monotonic() + _STOP_SECONDS
        for one in running.values():
            one.process.join(max(0.0, deadline - time.monotonic()))
            one.process.kill()


@dataclass(frozen=True)
class Logged:
    """Runs a command alone, with its output and that of whatever it starts added to a file."""

    log: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __call__(self, argv: Sequence[str]) -> int:
        begin(self.log)
        os.environ.update(self.environment)
        return run_alone(argv)


def begin(log: Path) -> None:
    """This process is a job: its output, and its children's, goes to the end of a file from now on."""
    os.environ[commands.AS_JOB] = "1"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
            stream.flush()
            os.dup2(file.fileno(), number)


def _devices() -> list[str]:
    """The GPUs that jobs may have, as CUDA_VISIBLE_DEVICES names them."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [one for one in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if one.strip()]
    import torch

    # Where there is none, a process that computes has a stand-in that counts one.
    return [str(device) for device in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
