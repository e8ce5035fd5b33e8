"""Rollouts on disk: written step by step, or read back in place of sampling."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from nla_megatron.config.schema import RlConfig
from nla_megatron.contract.files import atomic_path
from nla_megatron.contract.journal import read_rows
from nla_megatron.errors import MissingFile
from nla_megatron.parallel.world import World
from nla_megatron.types import Rollout, RolloutBatch

_FIELDS = [field.name for field in fields(Rollout)]
_NEEDED = [field.name for field in fields(Rollout) if field.default is field.default_factory is MISSING]


def _file(run_dir: str, step: int) -> Path:
    return Path(run_dir) / "rollouts" / f"step_{step:08d}.jsonl"


def check_replay(config: RlConfig) -> None:
    """Raises MissingFile where a run replays more than was recorded."""
    for step in range(config.steps if config.rollout.replay is not None else 0):
        _recorded(config, step)


def _recorded(config: RlConfig, step: int) -> Path:
    """The file that a step is replayed from."""
    path = _file(str(config.rollout.replay), step)
    if not path.is_file():
        raise MissingFile(f"no {path}", "a run made with rollout.record=true", "record more steps, or lower steps=")
    return path


class RolloutRecorder:
    """`rollout.record` writes `rollouts/step_*.jsonl`, one line per rollout; `rollout.replay` names a run to read."""

    def __init__(self, config: RlConfig, world: World):
        self.config, self.world = config, world

    def record(self, step: int, batch: RolloutBatch) -> None:
        if not self.config.rollout.record or not self.world.is_main:
            return
        path = _file(self.config.out, step)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_text("".join(json.dumps(asdict(rollout)) + "\n" for rollout in batch.rollouts))

    def replayed(self, step: int) -> list[Rollout] | None:
        """The recorded rollouts of a step; None when the run samples for itself. Raises MissingFile."""
        if self.config.rollout.replay is None:
            return None
        return [_rollout(row) for row in read_rows(_recorded(self.config, step), _NEEDED)]


def _rollout(row: dict[str, Any]) -> Rollout:
    # JSON has lists where a rollout has tuples.
    values: dict[str, Any] = {
        key: tuple(row[key]) if isinstance(row[key], list) else row[key] for key in _FIELDS if key in row
    }
    return Rollout(**values)
