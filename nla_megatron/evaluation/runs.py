"""The runs under a folder: what each was told, whether it is finished, and what it recorded of itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nla_megatron.config.run_directory import DONE, RECORD, flat, is_free, read_record, same_value
from nla_megatron.config.schema import SCHEMAS
from nla_megatron.contract.journal import Row, read_object, read_rows
from nla_megatron.errors import ConfigError, MissingFile, RunDirectoryError

METRICS, FIGURES = "metrics.jsonl", "eval.json"
SEED, DEFAULT_TASK = "seed", "nla"
# What runs must have in common to be comparable.
SAME = {"task.name": "tasks", "role": "roles", "data": "data", "corpus": "corpora"}


@dataclass(frozen=True)
class Run:
    """One run's directory: `name` is its path below the folder, `record` what it was told."""

    name: str
    directory: Path
    record: Mapping[str, Any]
    metrics: Sequence[Row]

    @cached_property
    def values(self) -> dict[str, Any]:
        """The record by dotted key."""
        return flat(self.record)

    @property
    def task(self) -> str:
        return str(self.values.get("task.name", DEFAULT_TASK))

    @property
    def seed(self) -> int:
        return int(self.values[SEED])

    @property
    def steps(self) -> int:
        return int(self.values["steps"])

    def figures(self) -> dict[str, float]:
        """The numbers of the run's own `eval.json`, if it has one."""
        return numbers(self.directory / FIGURES)

    def scalar(self, name: str, last: int, until: int | None = None) -> float | None:
        """The mean of a scalar over the `last` steps that have it, of the first `until` steps where that is given."""
        rows = [row for row in self.metrics if until is None or row["step"] < until]
        values = [float(row[name]) for row in rows if row.get(name) is not None][-last:]
        return sum(values) / len(values) if values else None


def numbers(path: Path) -> dict[str, float]:
    """The numbers of a JSON object by dotted key, an interval as `_low` and `_high`; none where there is no file."""
    if not path.is_file():
        return {}
    found: dict[str, float] = {}
    for key, value in flat(read_object(path)).items():
        if isinstance(value, list) and len(value) == 2:
            found |= {f"{key}_{end}": float(one) for end, one in zip(("low", "high"), value, strict=True) if _is(one)}
        elif _is(value):
            found[key] = float(value)
    return found


def _is(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def find_runs(root: Path, command: str, beside: Path) -> tuple[list[Run], list[str]]:
    """The finished runs of `command` under `root`, and the names of those that are not finished or cannot be read.

    Args:
        beside: a directory to pass over, where the comparison itself is written.

    Raises:
        MissingFile: there is none.
    """
    if not root.is_dir():
        raise MissingFile(f"no directory {root}", "a folder of runs", "correct root=")
    runs, unfinished = [], []
    for directory, record in _records(root, beside):
        name = str(directory.relative_to(root)) if directory != root else root.resolve().name
        if record is None:
            unfinished.append(f"{name} (its {RECORD} is torn, or another program's)")
        elif record["command"] != command:
            continue
        elif (directory / DONE).is_file():
            runs.append(Run(name, directory, record, read_rows(directory / METRICS, ("step",), torn=True)))
        else:
            unfinished.append(name)
    if not runs:
        told = f", {len(unfinished)} that are not" if unfinished else ""
        raise MissingFile(
            f"no finished {command} run under {root}{told}", f"directories that `{command}` has finished",
            "finish them, or correct root= or command=",
        )  # fmt: skip
    return runs, unfinished


def _records(root: Path, beside: Path) -> Iterator[tuple[Path, dict[str, Any] | None]]:
    """Each run's directory and its record, None where that is no record. Hidden folders are other programs'."""
    for path in sorted(root.rglob(RECORD)):
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if not hidden and beside.resolve() not in path.resolve().parents:
            yield path.parent, _record(path.parent)


def _record(directory: Path) -> dict[str, Any] | None:
    """None where the file says not what a run's record always says: it is somebody else's, or cannot be read."""
    try:
        found = read_record(directory)
    except (RunDirectoryError, MissingFile):
        return None
    counted = [key for key in (SEED, "steps") if hasattr(SCHEMAS.get(str(found["command"])), key)]
    return found if all(isinstance(found.get(key), int) for key in counted) else None


def check_alike(runs: Sequence[Run], same: Mapping[str, str] = SAME) -> None:
    """Raises ConfigError where runs differ in a key of `same`, which also says what it is."""
    for key, what in same.items():
        first, *others = ((run, run.values.get(f"inputs.{key}", run.values.get(key))) for run in runs)
        for run, value in others:
            if not same_value(value, first[1]):
                raise ConfigError(
                    f"runs of different {what}: {key}={_told(first[0], key)} in {first[0].name}, {_told(run, key)} in "
                    f"{run.name}",
                    "runs that differ in how they learn alone", "name a narrower folder with root=",
                )  # fmt: skip


def _told(run: Run, key: str) -> str:
    value, identity = run.values.get(key), run.values.get(f"inputs.{key}")
    return f"{value}" if identity is None else f"{value} ({identity})"


def varying(runs: Sequence[Run]) -> list[str]:
    """The keys in which runs differ and that change what they compute; not the seed."""
    keys = dict.fromkeys(key for run in runs for key in run.values)
    return [
        key
        for key in keys
        if key != SEED and not key.startswith("inputs.") and not is_free(key)
        and not all(same_value(run.values.get(key), runs[0].values.get(key)) for run in runs)
    ]  # fmt: skip


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """`optim.lr` as `lr` where no other key ends so."""
    ends = [key.rpartition(".")[2] for key in keys]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)}
