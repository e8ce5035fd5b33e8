"""A predictor alone learns a planted task with the real sampler: two features move the tokens that are rewarded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import torchrun

pytestmark = pytest.mark.slow

RAISES, LOWERS = "block3_feature3", "block3_feature5"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("steering")


@pytest.fixture(scope="module")
def found(scratch: Path) -> Any:
    return torchrun("steering_worker", 2, str(scratch))


def test_the_predictor_finds_the_sign_of_each_feature(found: Any) -> None:
    start, end = found["start"], found["steps"][-1]
    assert abs(start[f"eval_strength_mean/{RAISES}"]) < 1 and abs(start[f"eval_strength_mean/{LOWERS}"]) < 1
    assert end[f"eval_strength_min/{RAISES}"] > 1 and end[f"eval_strength_max/{LOWERS}"] < -1


def test_steering_is_better_than_none_on_held_out_prompts(found: Any) -> None:
    start, end = found["start"], found["steps"][-1]
    assert end["eval_reward_gain"] > 5 * end["eval_reward_gain_error"]
    assert end["eval_reward"] > 2 * end["eval_reward_plain"]
    assert end["eval_reward_plain"] == start["eval_reward_plain"], "the same prompts, seeds and frozen model"
    assert found["steps"][-1]["reward"] > 2 * found["steps"][0]["reward"]


def test_no_weight_of_the_model_changes(found: Any) -> None:
    assert found["unchanged"]


def test_sampler_and_trainer_steer_alike(found: Any) -> None:
    assert max(step["logprob_gap_max"] for step in found["steps"]) < 1e-4
    assert found["replay gap"] < 1e-4 < 0.1 < found["other strengths"]


def test_every_token_that_was_to_be_steered_was(found: Any) -> None:
    end = found["steps"][-1]
    assert end["eval_steering_failed"] == 0 and end["eval_steered_tokens"] > 0
    assert all(step["steering_failed"] == 0 and step["steered_tokens"] > 0 for step in found["steps"])


def test_the_export_is_the_predictor_and_says_what_it_steers(found: Any) -> None:
    assert found["exported gap"] == 0 and found["steers"]["features"] == [3, 5, 8]


def test_both_evaluations_are_kept_as_record_and_page(found: Any, scratch: Path) -> None:
    folder = scratch / "run" / "steering"
    names = {path.name for path in folder.iterdir()}
    assert names == {f"step_{step:08d}.{kind}" for step in (0, 12) for kind in ("json", "html")} | {"latest.html"}
    kept = json.loads((folder / "step_00000012.json").read_text())
    assert kept["numbers"]["eval_reward"] == found["steps"][-1]["eval_reward"]
    assert len(kept["prompts"]) == len(kept["steered"]["texts"]) == len(kept["plain"]["texts"]) == 32
