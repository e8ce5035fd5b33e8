"""Recorded rollouts come back as they were, and only from a run that recorded them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from nla_megatron.config.schema import RlConfig, RolloutConfig
from nla_megatron.errors import ColumnError, MissingFile
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


def test_a_line_says_where_its_row_is_and_is_replayed_all_the_same(tmp_path: Path) -> None:
    config = RlConfig(out=str(tmp_path / "first"), rollout=RolloutConfig(record=True))
    place = {7: {"doc_id": "a", "position": 3, "token": " x"}, 2: {"doc_id": "b", "position": 9, "token": "y"}}
    RolloutRecorder(config, world_of(), place.__getitem__).record(0, BATCH)
    lines = [
        json.loads(line) for line in (tmp_path / "first/rollouts/step_00000000.jsonl").read_text().split("\n")[:-1]
    ]
    assert [(line["row"], line["doc_id"], line["position"], line["token"]) for line in lines] == [
        (7, "a", 3, " x"), (7, "a", 3, " x"), (2, "b", 9, "y"),
    ]  # fmt: skip
    assert recorder(tmp_path / "second", replay=str(tmp_path / "first")).replayed(0) == list(ROLLOUTS)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"text": None}, "'text' in line 3 of .* is null"),
        ({"text": 3}, "'text' in line 3"),
        ({"text": "\ud83d"}, "surrogate"),
        ({"row": "7"}, "'row' in line 3 of .* is '7'"),
        ({"row": -1}, "'row' in line 3"),
        ({"finished": 1}, "'finished' in line 3"),
        ({"prompt_ids": None}, "'prompt_ids' in line 3 of .* is null"),
        ({"response_ids": [1.5]}, "'response_ids' in line 3"),
        ({"response_ids": [1, 2]}, "'logprobs' in line 3"),
    ],
)
def test_a_line_that_is_no_rollout_is_named_before_the_run(tmp_path: Path, change: dict[str, Any], found: str) -> None:
    path = tmp_path / "rollouts" / "step_00000000.jsonl"
    path.parent.mkdir()
    rows = [asdict(ROLLOUTS[0]), asdict(ROLLOUTS[2]) | change]
    path.write_text("\n\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8-sig")
    with pytest.raises(ColumnError, match=found):
        check_replay(RlConfig(out="again", steps=1, rollout=RolloutConfig(replay=str(tmp_path))))
