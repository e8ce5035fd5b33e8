"""`sweep`, or `-m` behind any command: the command once for every combination of the values given.

    out/sweep.json                        what is swept, and how each job stands
    out/003_optim.lr=0.0003,seed=1/       a job's own directory, a run like any other
    out/logs/003_optim.lr=0.0003,seed=1.log

Every job is checked before the first one starts. The same command again skips finished jobs and resumes the others;
with more values it adds jobs, and those that are there keep their directories.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from nla_megatron.config.compose import as_yaml, compose
from nla_megatron.config.multirun import axes_of, label_of, points_of
from nla_megatron.config.run_directory import RECORD, is_done, is_free_directory
from nla_megatron.config.schema import SweepConfig
from nla_megatron.config.typed import quoted
from nla_megatron.contract.files import write_json
from nla_megatron.contract.journal import read_object
from nla_megatron.errors import ConfigError, RunDirectoryError, RunError
from nla_megatron.launch.commands import COMMANDS, as_overrides
from nla_megatron.launch.jobs import DONE, FAILED, QUEUED, Job, Outcome, check_job, check_launcher, check_read, run_jobs
from nla_megatron.parallel import started

MANIFEST, LOGS, LAUNCHER_FILES = "sweep.json", "logs", "launcher"
WAITING = "waiting"
_OWN = "sweep."
_ENTRIES = ("command", "jobs")


@dataclass(frozen=True)
class SweepJob:
    """A job with the values that make it what it is, as overrides, and its whole configuration."""

    job: Job
    point: dict[str, str]
    config: Any


def configured(arguments: Sequence[str]) -> SweepConfig:
    """`COMMAND key=a,b out=DIR sweep.jobs=2` as a configuration. Raises ConfigError."""
    words = list(arguments)
    named = [f"command={words.pop(0)}"] if words and words[0].isalpha() else []
    own = [word.removeprefix(_OWN) for word in words if word.startswith(_OWN)]
    rest = [word for word in words if not word.startswith((_OWN, "out="))]
    out = [word.removeprefix("out=") for word in words if word.startswith("out=")][-1:]
    subdir = [word.removeprefix("subdir=") for word in own if word.startswith("subdir=")][-1:]
    if out and "${" in out[0]:
        before = out[0].split("${")[0]
        folder = before if before.endswith("/") else before.rpartition("/")[0]
        out, subdir = [folder or "."], [out[0].removeprefix(folder).lstrip("/")]
    placed = [f"out={out[0]}"] if out else []
    own = [word for word in own if not word.startswith("subdir=")]
    config: SweepConfig = compose("sweep", [*named, *own, *placed])
    # Texts in the command's own grammar would not survive another reading of the sweep's.
    return replace(config, overrides=[*config.overrides, *rest], subdir=subdir[0] if subdir else config.subdir)


def check(config: SweepConfig, world_size: int) -> None:
    """Everything about every job that can be known before the first one starts; raises a named error."""
    if (started.world_size() or 1) > 1:
        raise ConfigError(
            f"a sweep as one of {started.world_size()} ranks", "a process of its own: it starts each job's ranks",
            "leave out torchrun or srun",
        )  # fmt: skip
    jobs = planned(config)
    _check_distinct(jobs)
    _check_directory(config)
    configs = [one.config for one in jobs]
    for at, one in enumerate(jobs):
        if not is_done(one.config) and not getattr(one.config, "dry_run", False):
            configs[at] = check_job(f"job {one.job.name}", config.command, one.config, one.job.ranks)
    check_read(config.command, [(of, one.job.argv[1:]) for of, one in zip(configs, jobs, strict=True)])
    check_launcher([one.job for one in jobs], config.jobs, config.launcher)


def run(config: SweepConfig) -> None:
    """Run what is not finished, print how all of it stands. Raises RunError where a job failed."""
    jobs, before = planned(config), _read_manifest(config)
    states = {one.job.name: _standing(one, before.get(one.job.name)) for one in jobs}
    todo = [one.job for one in jobs if states[one.job.name].state != DONE]
    _write_manifest(config, jobs, states)

    def report(outcome: Outcome) -> None:
        states[outcome.name] = outcome
        _write_manifest(config, jobs, states)
        print(f"{outcome.state:<7} {outcome.name}", file=sys.stderr, flush=True)

    print(f"{len(jobs)} jobs, {len(jobs) - len(todo)} finished already", file=sys.stderr, flush=True)
    run_jobs(todo, config.jobs, config.launcher, report, Path(config.out) / LAUNCHER_FILES)
    print(table(list(states.values())), flush=True)
    failed = [outcome for outcome in states.values() if outcome.state == FAILED]
    if failed:
        raise RunError(
            f"{len(failed)} of {len(jobs)} jobs failed, the first is {failed[0].name}", "all of them finished",
            f"read {Path(config.out) / LOGS}; the same command runs what is not finished",
        )  # fmt: skip


def planned(config: SweepConfig) -> list[SweepJob]:
    """The jobs in their order. Raises ConfigError."""
    if config.command not in COMMANDS or config.command == "sweep":
        known = ", ".join(name for name in COMMANDS if name != "sweep")
        raise ConfigError(f"a sweep of {config.command!r}", f"one of {known}", "name the command to repeat")
    command = COMMANDS[config.command]
    fixed, axes = axes_of(config.command, as_overrides(command, config.overrides))
    names = _Names(config)
    make = partial(_planned, config, fixed)
    return [make(point, names.of(point)) for point in points_of(axes)]


def _planned(config: SweepConfig, fixed: list[str], point: dict[str, str], name: str) -> SweepJob:
    root = Path(config.out)
    swept = [f"{key}={value}" for key, value in point.items()]
    overrides = [*fixed, *swept, f"out={quoted(str(root / (config.subdir or name)))}"]
    composed = compose(config.command, overrides)
    if config.subdir:
        name = str(Path(composed.out).relative_to(root))
    ranks = composed.ranks if COMMANDS[config.command].on_ranks else 1
    log = root / LOGS / f"{name.replace('/', '_')}.log"
    return SweepJob(Job(name, (config.command, *overrides), ranks, log), point, composed)


class _Names:
    """The directory of each point: the one it had before, else the next number."""

    def __init__(self, config: SweepConfig):
        path = Path(config.out) / MANIFEST
        jobs = read_object(path, _ENTRIES)["jobs"] if path.is_file() else []
        self.known = {tuple(job["overrides"].items()): job["name"] for job in jobs}
        self.next = len(jobs)

    def of(self, point: dict[str, str]) -> str:
        known = self.known.get(tuple(point.items()))
        if known is not None:
            return str(known)
        self.next += 1
        label = label_of(point)
        return f"{self.next - 1:03d}_{label}" if label else f"{self.next - 1:03d}"


def _check_distinct(jobs: Sequence[SweepJob]) -> None:
    runs: dict[str, str] = {}
    places: dict[Path, str] = {}
    for one in jobs:
        told = ", ".join(f"{key}={value}" for key, value in one.point.items())
        place = Path(one.config.out).resolve()
        if place in places:
            raise ConfigError(
                f"two jobs with the directory {one.config.out}: {places[place]}; {told}", "a directory for each job",
                "name every key that is swept in the directory, or leave its pattern out",
            )  # fmt: skip
        run = as_yaml(replace(one.config, out=""))
        if run in runs:
            raise ConfigError(
                f"two jobs that are the same run: {runs[run]}; {told}", "each combination once", "leave one value out"
            )
        places[place], runs[run] = told, told


def _check_directory(config: SweepConfig) -> None:
    out, manifest = Path(config.out), Path(config.out) / MANIFEST
    if not manifest.is_file():
        if (out / RECORD).is_file() or not is_free_directory(out):
            raise RunDirectoryError(
                f"{out} is not empty and no sweep's directory", "a new or empty directory", "choose another out="
            )
        return
    found = read_object(manifest, _ENTRIES)["command"]
    if found != config.command:
        raise RunDirectoryError(
            f"{out} holds a sweep of {found}", f"a sweep of {config.command}", "choose another out="
        )


def _standing(one: SweepJob, before: dict[str, Any] | None) -> Outcome:
    """What is known before anything is run: a finished directory, or a command that leaves no mark."""
    seconds = before["seconds"] if before else None
    marked = is_done(one.config)
    unmarked = before is not None and before["state"] == DONE and Path(one.config.out).exists()
    if marked or (unmarked and not (Path(one.config.out) / RECORD).is_file()):
        return Outcome(one.job.name, DONE, 0, seconds)
    return Outcome(one.job.name, WAITING)


def _read_manifest(config: SweepConfig) -> dict[str, dict[str, Any]]:
    path = Path(config.out) / MANIFEST
    return {job["name"]: job for job in read_object(path, _ENTRIES)["jobs"]} if path.is_file() else {}


def _write_manifest(config: SweepConfig, jobs: Sequence[SweepJob], states: dict[str, Outcome]) -> None:
    """Jobs of earlier calls that this one does not name stay in it, and so keep their directories."""
    entries = _read_manifest(config)
    for one in jobs:
        entries[one.job.name] = {
            **asdict(states[one.job.name]), "overrides": one.point, "out": str(one.config.out), "log": str(one.job.log),
        }  # fmt: skip
    Path(config.out).mkdir(parents=True, exist_ok=True)
    swept = list(dict.fromkeys(key for entry in entries.values() for key in entry["overrides"]))
    content = {"command": config.command, "overrides": config.overrides, "swept": swept}
    write_json(Path(config.out) / MANIFEST, {**content, "jobs": list(entries.values())})


def table(outcomes: Sequence[Outcome]) -> str:
    """One line per job: its directory, how it ended, how long it took, and what a failed one said."""
    width = max(len(outcome.name) for outcome in outcomes)
    lines = [f"{'job':<{width}}  {'state':<8} {'seconds':>9}"]
    for outcome in outcomes:
        seconds = "" if outcome.seconds is None else f"{outcome.seconds:.1f}"
        code = f"exit code {outcome.exit_code}: " if outcome.state == FAILED and outcome.exit_code is not None else ""
        lines.append(f"{outcome.name:<{width}}  {outcome.state:<8} {seconds:>9}  {code}{outcome.told}".rstrip())
    states = [outcome.state for outcome in outcomes]
    counts = ", ".join(f"{states.count(state)} {state}" for state in (DONE, FAILED, QUEUED, WAITING) if state in states)
    return "\n".join([*lines, counts])
