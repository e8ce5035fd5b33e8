"""What a response to a held-out row is worth: as in training, but for what knows the training rows alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nla_megatron.config.compose import compose
from nla_megatron.config.schema import RlConfig
from nla_megatron.errors import ConfigError
from nla_megatron.training.sides.held_out import held_out_rewards
from nla_megatron.training.sides.sae import SaeSide
from nla_megatron.types import Measured, Rollout
from tests.support.hooked import write_sae
from tests.support.tiny import SHAPE, tiny_model
from tests.support.worlds import world_of

ROWS = 40  # 10 steps of 4 prompts are an epoch
MEASURED = Measured(
    (Rollout(0, 0, 0, (1,), (2, 3), (0.0, 0.0), "a b", True), Rollout(1, 0, 1, (1,), (2, 3), (0.0, 0.0), "a a", True)),
    ("a b", "a a"),
    {"words": torch.tensor([2.0, 2.0]), "unique_words": torch.tensor([2.0, 1.0]), "correct": torch.tensor([1.0, 0.0])},
)


def config_of(*overrides: str) -> RlConfig:
    config: RlConfig = compose("rl", ["out=x", "task=lexical", "batch_size=4", *overrides])
    return config


def test_weights_that_change_with_the_epoch_change_in_an_evaluation_too() -> None:
    words = ("reward=correctness", "~reward.terms.format", "reward.terms.correctness.later_weight=3")
    config = config_of(*words, "reward.terms.correctness.change_by=epoch", "reward.terms.correctness.change_at=1")
    reward = held_out_rewards(config, ROWS, world_of())
    assert reward is not None
    assert reward(MEASURED, 9).tolist() == [1.0, 0.0]
    assert reward(MEASURED, 10).tolist() == [3.0, 0.0]


@pytest.fixture(scope="module")
def utilisation(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("zero") / "correct.jsonl"
    path.write_text("".join(f'{{"row": {row}, "correct": 0}}\n' for row in range(ROWS)))
    return f"+reward.terms.token_utilisation.options={{file: {path}, budget: 8}}"


def test_nothing_is_rewarded_that_knows_the_training_rows_alone(utilisation: str) -> None:
    assert held_out_rewards(config_of("reward=correctness", utilisation), ROWS, world_of()) is None


def test_steered_and_plain_cannot_be_compared_by_such_a_reward(utilisation: str, tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    write_sae(tmp_path / "sae", SHAPE.hidden_size)
    config = config_of("reward=correctness", utilisation, f"model={tmp_path / 'model'}", "rollout.max_new_tokens=8")
    options = {"interventions": [{"layer": 1, "sae": str(tmp_path / "sae"), "features": [3]}]}
    steered = replace(config, task=replace(config.task, name="sae", options=options))
    SaeSide.check(steered, 1)
    with pytest.raises(ConfigError) as caught:
        SaeSide.check(replace(steered, eval_every=1), 1)
    assert "token_utilisation" in caught.value.found and "eval_every=1" in caught.value.found
