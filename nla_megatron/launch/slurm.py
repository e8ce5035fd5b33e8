"""Jobs as an array on Slurm, by submitit: it writes the batch script, starts the tasks and queues a job again that was
preempted or met its time limit; a job that starts again resumes, as every command does.

How jobs stand is asked of `squeue` and of what they leave behind: clusters without accounting answer too.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nla_megatron.config.schema import LauncherConfig
from nla_megatron.contract.files import write_json
from nla_megatron.contract.journal import read_object
from nla_megatron.errors import ConfigError, RunError
from nla_megatron.launch import commands
from nla_megatron.launch.jobs import QUEUED, Job, Outcome, begin, outcome_of, run_alone

_POLL_SECONDS, _LONGEST_POLL_SECONDS = 1.0, 30.0
_GRACE_SECONDS = 20.0  # until files written on a node are seen here
_PORTS = 20_000
_SUBMITTED = "submitted.json"


def check_slurm(launcher: LauncherConfig, ranks: int) -> None:
    """Raises ConfigError where nothing can be submitted from here."""
    if importlib.util.find_spec("submitit") is None:
        raise ConfigError("launcher=slurm without submitit", "the package that submits the array",
                          "pip install 'nla_megatron[slurm]'")  # fmt: skip
    for program in ("sbatch", "squeue"):
        if shutil.which(program) is None:
            raise ConfigError(f"launcher=slurm where there is no `{program}`", "a machine of a Slurm cluster",
                              "run this on its login node, or use launcher=local")  # fmt: skip
    if ranks % launcher.nodes:
        raise ConfigError(f"{ranks} ranks on launcher.nodes={launcher.nodes}", "as many ranks on every node",
                          "change launcher.nodes, or the layout")  # fmt: skip


class Task:
    """What a task of the array runs, on its node."""

    def __init__(self, nodes: int):
        self.nodes = nodes

    def __call__(self, job: Job) -> int:
        begin(job.log)
        if self.nodes == 1:
            return run_alone(job.argv)
        # One task is one rank. Jobs of other numbers may share the node, so the number chooses the port.
        os.environ["MASTER_ADDR"] = _first_address(os.environ["SLURM_JOB_NODELIST"])
        os.environ["MASTER_PORT"] = str(_PORTS + int(os.environ["SLURM_JOB_ID"]) % _PORTS)
        return commands.run(job.argv)

    def checkpoint(self, job: Job) -> Any:
        """submitit asks before it queues the job again: the same task, which then resumes."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, job)


def run_on_slurm(
    jobs: Sequence[Job], at_once: int, launcher: LauncherConfig, report: Callable[[Outcome], None], folder: Path
) -> None:
    """Submit what is not in the queue already and, unless `launcher.wait` is off, stay until all of it has left."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = {name: known for name, known in _submitted(folder).items() if name in {job.name for job in jobs}}
    queued = _in_queue(ids.values())
    waiting = {name: known for name, known in ids.items() if known in queued}
    new = [job for job in jobs if job.name not in waiting]
    waiting |= _submit(new, at_once, launcher, folder)
    write_json(folder / _SUBMITTED, {**_submitted(folder), **waiting})
    by_name = {job.name: job for job in jobs}
    if not launcher.wait:
        for name in waiting:
            report(Outcome(name, QUEUED))
        return
    pause = _POLL_SECONDS
    while waiting:
        time.sleep(pause)
        pause = min(pause * 1.2, _LONGEST_POLL_SECONDS)
        queued = _in_queue(waiting.values())
        for name in [name for name, known in waiting.items() if known not in queued]:
            report(outcome_of(by_name[name], _exit_code(folder, waiting.pop(name)), None))
            pause = _POLL_SECONDS


def _submit(jobs: Sequence[Job], at_once: int, launcher: LauncherConfig, folder: Path) -> dict[str, str]:
    """The array's job id of each job, as `squeue` writes it. Jobs of other sizes are arrays of their own."""
    import submitit

    ids: dict[str, str] = {}
    for ranks in dict.fromkeys(job.ranks for job in jobs):
        alike = [job for job in jobs if job.ranks == ranks]
        executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=launcher.requeues)
        executor.update_parameters(**_parameters(launcher, ranks, at_once))
        with _nobodys_rank():
            try:
                submitted = executor.map_array(Task(launcher.nodes), alike)
            except submitit.core.utils.FailedJobError as error:
                raise RunError(
                    f"sbatch refused {len(alike)} jobs: {' '.join(str(error).split())[-300:]}", "an array in the queue",
                    "correct launcher.*, which become options of sbatch",
                ) from None  # fmt: skip
        ids |= {job.name: str(one.job_id) for job, one in zip(alike, submitted, strict=True)}
    return ids


def _parameters(launcher: LauncherConfig, ranks: int, at_once: int) -> dict[str, Any]:
    given = {
        key: getattr(launcher, key)
        for key in ("partition", "account", "qos", "constraint", "gpus_per_node", "cpus_per_task")
        if getattr(launcher, key) is not None
    }
    if launcher.memory_gb is not None:
        given["mem"] = f"{int(launcher.memory_gb * 1024)}M"
    return {
        **given,
        "job_name": "nla_megatron",
        "nodes": launcher.nodes,
        "ntasks_per_node": 1 if launcher.nodes == 1 else ranks // launcher.nodes,
        "time": launcher.minutes,
        "array_parallelism": at_once,
        "setup": list(launcher.setup),
        "additional_parameters": dict(launcher.options),
    }


@contextmanager
def _nobodys_rank() -> Iterator[None]:
    """sbatch hands this environment on; what says that this process is some other job's must not go along."""
    kept = {key: value for key, value in os.environ.items() if key.startswith("SLURM_") and key != "SLURM_CONF"}
    for key in kept:
        del os.environ[key]
    try:
        yield
    finally:
        os.environ.update(kept)


def _in_queue(ids: Any) -> set[str]:
    """Those of the array jobs that wait or run, as `123_4`."""
    numbers = sorted({known.partition("_")[0] for known in ids})
    if not numbers:
        return set()
    told = subprocess.run(
        ["squeue", "--noheader", "--array", "--format=%i %T", f"--jobs={','.join(numbers)}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if told.returncode and "Invalid job id" not in told.stderr:  # which is said of jobs that are long gone
        raise RunError(f"squeue: {told.stderr.strip()[:200]}", "an answer of the cluster", "repeat the command later")
    over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
    lines = [line.split() for line in told.stdout.splitlines()]
    return {name for name, state in lines if state not in over}


def _exit_code(folder: Path, known: str) -> int | None:
    """What the command returned; None where the job ended without a result."""
    from submitit.core.utils import pickle_load

    path = folder / f"{known}_0_result.pkl"
    deadline = time.monotonic() + _GRACE_SECONDS
    while not path.is_file() and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    if not path.is_file():
        return None
    kind, value = pickle_load(path)
    return int(value) if kind == "success" else 1


def _submitted(folder: Path) -> dict[str, str]:
    path = folder / _SUBMITTED
    return dict(read_object(path)) if path.is_file() else {}


def _first_address(nodes: str) -> str:
    """The first node's address: its name need not resolve."""
    names = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    shown = subprocess.run(
        ["scontrol", "--oneliner", "show", "node", names.stdout.split()[0]], capture_output=True, text=True, check=True
    )
    fields = dict(field.split("=", 1) for field in shown.stdout.split() if "=" in field)
    return fields["NodeAddr"]
