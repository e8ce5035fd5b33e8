"""Recorded rollouts come back as they were, and only from a run that recorded them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nla_megatron.config.schema import RlConfig, RolloutConfig
from nla_megatron.errors import MissingFile
from nla_megatron.training.recorder import RolloutRecorder, check_replay
from nla_megatron.types import InjectionCount, Rollout, RolloutBatch
from tests.support.worlds import world_of

ROLLOUTS = (
    Rollout(0, 0, 7, (1, 2, 3), (4, 5), (-0.1, -1 / 3), "naïve ㈎\n", True),
    Rollout(0, 1, 7, (1, 2, 3), (), (), "", False),
    Rollout(1, 0, 2, (1, 2, 3), (9,), (-12.5,), "\u2028", True),
)
BATCH = RolloutBatch(ROLLOUTS, InjectionCount(3, 3))


def recorder(out: Path, rank: int = 0, **options: object) -> RolloutRecorder:
    config = RlConfig(out=str(out), rollout=RolloutConfig(**options))  # type: ignore[arg-type]
    return RolloutRecorder(config, replace(world_of(dp=2), rank=rank))


def test_another_run_replays_what_was_recorded(tmp_path: Path) -> None:
    """To the bit: log-probs are compared with the trainer's."""
    recorder(tmp_path / "first", record=True).record(3, BATCH)
    assert recorder(tmp_path / "second", replay=str(tmp_path / "first")).replayed(3) == list(ROLLOUTS)


def test_a_step_that_was_not_recorded_is_named(tmp_path: Path) -> None:
    recorder(tmp_path, record=True).record(3, BATCH)
    with pytest.raises(MissingFile, match=r"step_00000004.jsonl[\s\S]*rollout.record=true"):
        recorder(tmp_path / "second", replay=str(tmp_path)).replayed(4)


def test_a_run_that_replays_more_steps_than_were_recorded_is_refused_before_it(tmp_path: Path) -> None:
    for step in range(2):
        recorder(tmp_path, record=True).record(step, BATCH)
    replayed = RlConfig(out="again", steps=2, rollout=RolloutConfig(replay=str(tmp_path)))
    check_replay(replayed)
    check_replay(replace(replayed, steps=9, rollout=RolloutConfig()))
    with pytest.raises(MissingFile, match=r"step_00000002.jsonl"):
        check_replay(replace(replayed, steps=3))


def test_a_run_that_samples_replays_nothing(tmp_path: Path) -> None:
    assert recorder(tmp_path).replayed(0) is None


@pytest.mark.parametrize(("rank", "record"), [(0, False), (1, True)])
def test_nothing_is_written_unless_asked_and_by_rank_0_alone(tmp_path: Path, rank: int, record: bool) -> None:
    recorder(tmp_path, rank, record=record).record(0, BATCH)
    assert list(tmp_path.rglob("*")) == []
