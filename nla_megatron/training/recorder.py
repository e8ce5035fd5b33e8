"""Rollouts on disk: written step by step, or read back in place of sampling."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from nla_megatron.config.schema import RlConfig
from nla_megatron.contract.files import atomic_path
from nla_megatron.errors import ColumnError, MissingFile
from nla_megatron.parallel.world import World
from nla_megatron.reading import json_objects, shown, text_value
from nla_megatron.types import Rollout, RolloutBatch

Place = Callable[[int], Mapping[str, Any]]
"""Where a row can be found again."""
_REMEDY = "record the run again, or replay fewer steps"


def nowhere(row: int) -> Mapping[str, Any]:
    return {}


def _file(run_dir: str, step: int) -> Path:
    return Path(run_dir) / "rollouts" / f"step_{step:08d}.jsonl"


def check_replay(config: RlConfig) -> None:
    """Raises MissingFile where a run replays more than was recorded, ColumnError where a record is none."""
    for step in range(config.steps if config.rollout.replay is not None else 0):
        read_rollouts(_recorded(config, step))


def _recorded(config: RlConfig, step: int) -> Path:
    """The file that a step is replayed from."""
    path = _file(str(config.rollout.replay), step)
    if not path.is_file():
        raise MissingFile(f"no {path}", "a run made with rollout.record=true", "record more steps, or lower steps=")
    return path


class RolloutRecorder:
    """`rollout.record` writes `rollouts/step_*.jsonl`, one line per rollout; `rollout.replay` names a run to read."""

    def __init__(self, config: RlConfig, world: World, place: Place = nowhere):
        self.config, self.world, self.place = config, world, place

    def record(self, step: int, batch: RolloutBatch) -> None:
        if not self.config.rollout.record or not self.world.is_main:
            return
        path = _file(self.config.out, step)
        path.parent.mkdir(parents=True, exist_ok=True)
        places = {row: self.place(row) for row in {rollout.row for rollout in batch.rollouts}}
        lines = (json.dumps({**places[rollout.row], **asdict(rollout)}) + "\n" for rollout in batch.rollouts)
        with atomic_path(path) as temporary:
            temporary.write_text("".join(lines))

    def replayed(self, step: int) -> list[Rollout] | None:
        """The recorded rollouts of a step; None when the run samples for itself. Raises MissingFile, ColumnError."""
        if self.config.rollout.replay is None:
            return None
        return read_rollouts(_recorded(self.config, step))


def read_rollouts(path: Path) -> list[Rollout]:
    """The rollouts of a file that `rollout.record` wrote. Raises ColumnError with the line and what is wrong in it."""
    rollouts = [_rollout(record, f"line {number} of {path}") for number, record in json_objects(path, remedy=_REMEDY)]
    if not rollouts:
        raise ColumnError(f"no rollout in {path}", "one in each line", _REMEDY)
    return rollouts


def _rollout(record: Mapping[str, Any], where: str) -> Rollout:
    # What else a line has says where its row is.
    values: dict[str, Any] = {each.name: record.get(each.name) for each in fields(Rollout)}
    for name in ("group", "sample", "row"):
        _require(type(values[name]) is int and values[name] >= 0, name, values[name], where, "a number from 0 on")
    for name, kinds in (("prompt_ids", (int,)), ("response_ids", (int,)), ("logprobs", (int, float))):
        value = values[name]
        good = isinstance(value, list) and all(type(one) in kinds for one in value)
        _require(good, name, value, where, "a list of numbers")
        values[name] = tuple(value)
    text_value(values["text"], where, "text")
    _require(isinstance(values["finished"], bool), "finished", values["finished"], where, "true or false")
    count = len(values["response_ids"])
    _require(len(values["logprobs"]) == count, "logprobs", values["logprobs"], where, f"{count} of them")
    return Rollout(**values)


def _require(good: bool, name: str, value: Any, where: str, expected: str) -> None:
    if not good:
        raise ColumnError(f"{name!r} in {where} is {shown(value)}", expected, _REMEDY)
