"""The reward by hand for each transform, and that a better reconstruction is worth more."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nla_megatron import geometry
from nla_megatron.config.schema import RewardConfig
from nla_megatron.errors import ConfigError
from nla_megatron.rewards import make_reward, register

TRANSFORMS = ["negative", "log", "exp", "bounded"]


def rewards(mse: list[float], failed: list[bool], transform: str, temperature: float = 1.0) -> list[float]:
    reward = make_reward(RewardConfig(transform=transform, temperature=temperature))
    return reward(torch.tensor(mse), torch.tensor(failed)).tolist()


@pytest.mark.parametrize(
    ("transform", "temperature", "by_hand"),
    [
        ("negative", 1.0, [-0.5, -1.5]),
        ("log", 1.0, [math.log(2), -math.log(1.5)]),
        ("exp", 1.0, [math.exp(-0.5), math.exp(-1.5)]),
        ("exp", 3.0, [math.exp(-1.5), math.exp(-4.5)]),
        ("bounded", 1.0, [1 / 1.5, 1 / 2.5]),
    ],
)
def test_each_transform_by_hand(transform: str, temperature: float, by_hand: list[float]) -> None:
    assert rewards([0.5, 1.5], [False, False], transform, temperature) == pytest.approx(by_hand)


@pytest.mark.parametrize(
    ("transform", "worth"), [("negative", -2.0), ("log", -math.log(2)), ("exp", math.exp(-2)), ("bounded", 1 / 3)]
)
def test_a_failed_response_is_worth_an_orthogonal_reconstruction(transform: str, worth: float) -> None:
    """Whatever error stands beside it, and without touching the others."""
    found = rewards([0.1, 0.1, float("nan")], [False, True, True], transform)
    assert found[1:] == pytest.approx([worth, worth])
    assert found[0] == rewards([0.1], [False], transform)[0]
    assert found[0] > worth


@pytest.mark.parametrize("transform", TRANSFORMS)
@given(st.floats(0.001, 3.9), st.floats(0.001, 3.9))
def test_a_better_reconstruction_is_never_worth_less(transform: str, a: float, b: float) -> None:
    better, worse = rewards([min(a, b), max(a, b)], [False, False], transform)
    assert better >= worse
    assert better > worse or abs(a - b) < 1e-5


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_reward_of_vectors_grows_as_they_turn_towards_the_target(transform: str) -> None:
    target = torch.tensor([[1.0, 0.0]]).expand(4, 2)
    angles = torch.tensor([math.pi, 1.5, 0.7, 0.1])
    predicted = torch.stack([angles.cos(), angles.sin()], dim=1)
    mse = geometry.row_mse(predicted, target)
    found = rewards(mse.tolist(), [False] * 4, transform)
    assert found == sorted(found) and len(set(found)) == 4


def test_an_unknown_reward_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"reward.name='praise'[\s\S]*reconstruction"):
        make_reward(RewardConfig(name="praise"))


def test_a_name_is_taken_once() -> None:
    make_reward(RewardConfig())
    with pytest.raises(ValueError, match="'reconstruction' is registered already"):
        register("reconstruction")(lambda config: make_reward(config))
