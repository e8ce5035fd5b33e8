"""A sampler that runs another policy stops the step, and the run's directory says at which tokens it did."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from nla_megatron.config.compose import compose
from nla_megatron.config.schema import RlConfig, RolloutConfig
from nla_megatron.errors import RolloutError
from nla_megatron.parallel.world import World
from nla_megatron.training.logprob_gap import WORST, GapCheck, furthest
from nla_megatron.training.rl import RlTrainer
from nla_megatron.types import Rollout
from tests.support.credited import PROMPTS, SAMPLES, WrittenSampler, out_of, overrides, write_files
from tests.support.hooked import Hooked
from tests.support.tiny import tiny_tokenizer

ROLLOUTS = (
    Rollout(0, 0, 3, (7, 8, 9), (4, 5), (-0.5, -1.5), "", True),
    Rollout(0, 1, 3, (7,), (4, 5, 6), (-2.0, -3.0, -4.0), "", True),
    Rollout(1, 0, 8, (7,), (), (), "", False),
)
NEAR = torch.tensor([[0, 0, -0.5, -1.4, 0], [-2.0, -3.25, -4.125, 0, 0], [0.0] * 5])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def check(out: Path, world: World, tokenizer: Any, limit: float | None) -> GapCheck:
    return GapCheck(RlConfig(out=str(out), rollout=RolloutConfig(max_logprob_gap=limit)), tokenizer, world)


def test_responses_are_ordered_by_their_worst_token() -> None:
    assert [(apart.rollout.sample, apart.token, apart.gap) for apart in furthest(ROLLOUTS, NEAR)] == [
        (1, 1, 0.25), (0, 1, pytest.approx(0.1)),
    ]  # fmt: skip
    lost = NEAR.clone()
    lost[0, 2] = math.nan
    assert [(apart.rollout.sample, apart.token) for apart in furthest(ROLLOUTS, lost)] == [(0, 0), (1, 1)]


@pytest.mark.parametrize(("limit", "gap"), [(0.1, 0.1), (None, math.nan), (None, 9.0)])
def test_within_the_limit_or_without_one_nothing_is_asked_or_written(
    tmp_path: Path, world: World, tokenizer: Any, limit: float | None, gap: float
) -> None:
    check(tmp_path, world, tokenizer, limit)(ROLLOUTS, lambda: pytest.fail("asked"), 7, {"logprob_gap_max": gap})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("gap", [0.25, math.inf, math.nan])
def test_the_message_names_the_token_and_the_file_that_has_them_all(
    tmp_path: Path, world: World, tokenizer: Any, gap: float
) -> None:
    with pytest.raises(RolloutError) as error:
        check(tmp_path, world, tokenizer, 0.1)(ROLLOUTS, lambda: NEAR, 7, {"logprob_gap_max": gap})
    said = str(error.value)
    path = tmp_path / "logprob_gap" / "step_00000007.jsonl"
    assert "max_logprob_gap=0.1" in said and "number 1 of a response to row 3" in said and str(path) in said
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert (first["row"], first["sample"], first["token"], first["gap"]) == (3, 1, 1, 0.25)
    assert first["token_text"] == tokenizer.decode([5])
    assert first["trainer_logprobs"] == [-2.0, -3.25, -4.125] and first["logprobs"] == [-2.0, -3.0, -4.0]
    assert second["sample"] == 0


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_a_step_of_rl_stops_before_any_weight_moves(tmp_path: Path, world: World, algorithm: str) -> None:
    """PPO compares what it looked at before its first update, GRPO what the update itself computes."""
    write_files(tmp_path)
    words = [*overrides(tmp_path, "single", algorithm, "lexical"), "rollout.max_logprob_gap=1e-3"]
    trainer = RlTrainer(compose("rl", words), world, WrittenSampler)
    before = {name: values.clone() for name, values in trainer.side.model.state_dict().items() if values is not None}
    with pytest.raises(RolloutError, match="sampler and trainer"):
        trainer.step(0)
    after = trainer.side.model.state_dict()
    assert all(torch.equal(values, after[name]) for name, values in before.items())

    [path] = (out_of(tmp_path, "single", algorithm, "lexical") / "logprob_gap").iterdir()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows and len(rows) <= min(WORST, PROMPTS * SAMPLES)
    model = Hooked(tmp_path / "model")
    for row in rows:
        wanted = model.logprobs(tuple(row["prompt_ids"]), tuple(row["response_ids"]), [])
        torch.testing.assert_close(torch.tensor(row["trainer_logprobs"]), wanted, rtol=0, atol=2e-5)
        gaps = (wanted - torch.tensor(row["logprobs"])).abs()
        assert row["token"] == int(gaps.argmax()) and row["gap"] == pytest.approx(float(gaps.max()), abs=2e-5)
    assert [row["gap"] for row in rows] == sorted((row["gap"] for row in rows), reverse=True)
