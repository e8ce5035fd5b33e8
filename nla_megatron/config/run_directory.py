"""An output directory belongs to one run: the same command resumes it, another is refused, and so is the same one twice
at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from nla_megatron.config.compose import as_yaml, completed
from nla_megatron.config.lock import Lock
from nla_megatron.disk import room_on
from nla_megatron.errors import ConfigError, RunDirectoryError, SidecarError
from nla_megatron.hub import name_of
from nla_megatron.reading import read_yaml, shown
from nla_megatron.types import DATASET_SIDECAR

RECORD = "run.yaml"
DONE = "done"
LOCK = ".lock"
CHECKPOINTS, PERMANENT = "checkpoints", "permanent"
_STEP = re.compile(r"step_\d+")
_PARTIAL = f".{RECORD}.partial"  # a kill while the record is written leaves a directory that the same command can use
# What may change between a run and its resumption: where and how fast it runs, never what it computes.
_FREE = (
    "parallel", "logger", "allow_unknown_config", "micro_batch_size", "save_every", "keep_checkpoints", "keep_every",
    "rollout.tp", "rollout.expert_parallel", "rollout.record",
    "rollout.gpu_memory_utilization", "rollout.cpu_kv_cache_gib", "rollout.max_num_seqs",
    "rollout.max_num_batched_tokens", "rollout.max_logprob_gap", "rollout.kv_block_size", "rollout.prefix_caching",
    "rollout.compiled", "rollout.sleep", "endpoint.concurrency", "endpoint.max_retries", "endpoint.timeout",
    "endpoint.backoff", "endpoint.max_failures", "endpoint.base_url",
)  # fmt: skip


def check_run_directory(command: str, config: Any) -> None:
    """Raises RunDirectoryError where `config.out` holds another run, or files of nobody's run; writes nothing."""
    out = Path(config.out)
    record = out / RECORD
    if not record.is_file():
        if not is_free_directory(out):
            raise RunDirectoryError(
                f"{out} is not empty and no run's directory", "a new or empty directory", "choose another out="
            )
        return
    found, expected = read_record(out), run_record(command, config)
    for key, before, now in _differences(out, found, expected):
        raise RunDirectoryError(
            f"{out} holds a run with {key}={before!r}", f"{key}={now!r}, as in this command",
            "choose another out=, or repeat the run's own command to resume it",
        )  # fmt: skip


def is_free_directory(out: Path) -> bool:
    """Whether a command that has not been here may make `out` its own: it is not there, or nobody's files are in it."""
    return not out.exists() or (out.is_dir() and all(path.name in (_PARTIAL, LOCK) for path in out.iterdir()))


def read_record(directory: Path) -> dict[str, Any]:
    """The record of a run's directory. Raises RunDirectoryError where it is torn or somebody else's."""
    path, remedy = directory / RECORD, f"remove {directory} and run its command again, or choose another directory"
    found = read_yaml(path, RunDirectoryError, remedy)
    if not isinstance(found, dict) or "command" not in found:
        raise RunDirectoryError(f"{path} holds {shown(found)}", "the record that a run writes as it begins", remedy)
    return found


@contextmanager
def owned(config: Any) -> Iterator[None]:
    """Inside, nobody else writes `config.out`; one process of a command calls it.

    Raises:
        RunDirectoryError: another process is at it, or nothing can be written there.
    """
    out = Path(config.out)
    with room_on(out):
        out.mkdir(parents=True, exist_ok=True)
    lock = Lock(out, LOCK)
    lock.take()
    try:
        yield
    finally:
        lock.release()


def refuse_owned(config: Any) -> None:
    """Raises RunDirectoryError where another process writes `config.out`; changes nothing."""
    Lock(Path(config.out), LOCK).refuse_owned()


def _differences(out: Path, found: dict[str, Any], expected: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The keys whose values differ and that say what a run computes, each with both values."""
    if found["command"] != expected["command"]:
        yield "command", found["command"], expected["command"]
    recorded, wanted, usual = flat(found), flat(expected), flat(_completed(out, found))
    for key in sorted({*recorded, *wanted}):
        # What a record does not have was at its default: the run is older than the key.
        before, now = recorded.get(key, usual.get(key)), wanted.get(key)
        if not is_free(key) and not same_value(before, now):
            yield key, before, now


def configuration_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a record says of the configuration: all but the command and the identity of its tables."""
    return {key: value for key, value in record.items() if key not in ("command", "inputs")}


def _completed(out: Path, found: dict[str, Any]) -> dict[str, Any]:
    try:
        return completed(found["command"], configuration_of(found))
    except ConfigError as error:
        raise RunDirectoryError(f"{out} holds a run with {error.found}", error.expected, error.remedy) from None


def claim_run_directory(command: str, config: Any) -> None:
    """Make the directory this run's, with the configuration that made it beside the results. One process calls it.

    Raises RunDirectoryError as `check_run_directory`, which another run may have made say so since.
    """
    check_run_directory(command, config)
    out = Path(config.out)
    with room_on(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / _PARTIAL).write_text(yaml.safe_dump(run_record(command, config), sort_keys=False))
        (out / _PARTIAL).replace(out / RECORD)


def is_done(config: Any) -> bool:
    return bool(config.out) and (Path(config.out) / DONE).is_file()


def mark_done(config: Any) -> None:
    """The last thing a stage does."""
    (Path(config.out) / DONE).write_text("")


def complete_steps(directory: Path) -> dict[int, Path]:
    """The checkpoints of a directory that were finished, by step, oldest first."""
    return {step: path for step, path in saved_steps(directory).items() if (path / "state.json").is_file()}


def saved_steps(directory: Path) -> dict[int, Path]:
    """The checkpoints of a directory by step, oldest first, whole or not; none that is being written, or put aside."""
    found = [path for path in directory.glob("step_*") if _STEP.fullmatch(path.name) and path.is_dir()]
    return dict(sorted((int(path.name.removeprefix("step_")), path) for path in found))


def permanent_steps(run_dir: Path) -> dict[int, Path]:
    """The checkpoints of a run that stay for good, by step, oldest first."""
    return complete_steps(run_dir / CHECKPOINTS / PERMANENT)


def run_record(command: str, config: Any) -> dict[str, Any]:
    """What a run's directory says of it: the configuration but for `out`, and the identity of its tables."""
    values = yaml.safe_load(as_yaml(config))
    values.pop("out")
    return {"command": command, **values, "inputs": _dataset_ids(values)}


def _dataset_ids(values: dict[str, Any]) -> dict[str, str]:
    """By key, the identity of each table that the configuration names: a path may hold another table tomorrow."""
    sidecars = {key: Path(f"{value}{DATASET_SIDECAR}") for key, value in flat(values).items() if isinstance(value, str)}
    return {key: _dataset_id(path) for key, path in sidecars.items() if _is_file(path)}


def _dataset_id(path: Path) -> str:
    sidecar = read_yaml(path, SidecarError)
    if not isinstance(sidecar, dict) or "dataset_id" not in sidecar:
        raise SidecarError(f"no dataset_id in {path}", "the sidecar of a table", "write the table again")
    return str(sidecar["dataset_id"])


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long or with a null, and so no path but a text
        return False


def same_value(one: Any, other: Any) -> bool:
    """Whether two recorded values say the same: equal ones, two spellings of the path of one file or directory, and
    two places of one commit of the hub.

    An empty group is none: so it is written in older records.
    """
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_value, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_value(one[key], other[key]) for key in one)
    if isinstance(one, str) and isinstance(other, str):
        return one == other or is_same_file(one, other) or "" != name_of(one) == name_of(other)
    return (None if one == {} else one) == (None if other == {} else other)


def is_same_file(one: str, other: str) -> bool:
    """Whether two paths, relative ones from here, lead to one file or directory that is there."""
    try:
        return bool(one and other) and Path(one).samefile(other)
    except (OSError, ValueError):  # not there; too long or with a null, and so no path but a text
        return False


def is_free(key: str) -> bool:
    """Whether a dotted key says where and how fast a run runs, and not what it computes."""
    return any(key == free or key.startswith(free + ".") for free in _FREE)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    return dict(_items(values, prefix))


def _items(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
