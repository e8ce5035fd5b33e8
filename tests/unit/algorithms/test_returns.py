"""Rewards along a response and generalised advantages, by hand and against their definition as a sum."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nla_megatron.algorithms.returns import generalised_advantages, rewards_to_go, token_rewards
from nla_megatron.config.schema import AlgorithmConfig
from tests.support.sampled import sampled


def test_the_tasks_reward_is_at_the_last_token() -> None:
    rewards_NT, statistics = token_rewards(sampled([2.0, -1.0], [0, 0], [3, 1]), AlgorithmConfig())
    assert rewards_NT.tolist() == [[0, 0, 0, 2.0, 0], [0, -1.0, 0, 0, 0]] and statistics == {}


@pytest.mark.parametrize(
    ("estimator", "kl"),
    [
        ("k1", [1.0, -2.0, 0.5]),
        ("k2", [0.5, 2.0, 0.125]),
        ("k3", [math.exp(-1), math.exp(2) - 3, math.exp(-0.5) - 0.5]),
    ],
)
def test_a_kl_in_the_reward_is_taken_off_each_token(estimator: str, kl: list[float]) -> None:
    old, reference = [[-1.0, -3.0], [-0.5]], [[-2.0, -1.0], [-1.0]]
    config = AlgorithmConfig(kl=estimator, kl_in="reward", kl_coef=0.1)
    rewards_NT, statistics = token_rewards(sampled([2.0, 5.0], [0, 0], [2, 1], old=old, reference=reference), config)
    expected = [[0, -0.1 * kl[0], 2 - 0.1 * kl[1], 0], [0, 5 - 0.1 * kl[2], 0, 0]]
    torch.testing.assert_close(rewards_NT, torch.tensor(expected, dtype=torch.float64))
    assert statistics == {"kl_in_reward": pytest.approx(sum(kl) / 3)}


def test_a_kl_in_the_reward_is_clamped() -> None:
    config = AlgorithmConfig(kl="k1", kl_in="reward", kl_coef=1.0, kl_clamp=3.0)
    rewards_NT, _ = token_rewards(sampled([0.0], [0], [1], old=[[-1.0]], reference=[[-50.0]]), config)
    assert float(rewards_NT.sum()) == -3.0


def test_generalised_advantages_by_hand() -> None:
    """gamma 0.5, lambda 0.5; values 1, 2, 4 and a reward of 8 at the end.

    d = 0 + 0.5*2 - 1 = 0,  0 + 0.5*4 - 2 = 0,  8 - 4 = 4;  A = 0 + 0.25*1 = 0.25,  0 + 0.25*4 = 1,  4.
    """
    rewards, values = torch.tensor([[0.0, 0.0, 8.0]]), torch.tensor([[1.0, 2.0, 4.0]])
    found = generalised_advantages(rewards, values, torch.ones(1, 3), gamma=0.5, decay=0.5)
    assert found.tolist() == [[0.25, 1.0, 4.0]]


def test_what_the_mask_leaves_out_is_no_step() -> None:
    """A tool's words amid a response: neither discounted over nor credited."""
    rewards, values = torch.tensor([[0.0, 9.0, 0.0, 8.0, 9.0]]), torch.tensor([[1.0, 7.0, 2.0, 4.0, 7.0]])
    mask = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0]])
    found = generalised_advantages(rewards, values, mask, gamma=0.5, decay=0.5)
    assert found.tolist() == [[0.25, 0.0, 1.0, 4.0, 0.0]]


STEPS = st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=8)


@given(STEPS, st.floats(0, 1), st.floats(0, 1))
def test_generalised_advantages_are_the_decayed_sum_of_errors(
    steps: list[tuple[float, float]], gamma: float, decay: float
) -> None:
    rewards, values = [reward for reward, _ in steps], [value for _, value in steps] + [0.0]
    errors = [reward + gamma * values[t + 1] - values[t] for t, reward in enumerate(rewards)]
    expected = [sum((gamma * decay) ** (s - t) * errors[s] for s in range(t, len(errors))) for t in range(len(errors))]
    found = generalised_advantages(
        torch.tensor([rewards], dtype=torch.float64), torch.tensor([values[:-1]], dtype=torch.float64),
        torch.ones(1, len(steps)), gamma, decay,
    )  # fmt: skip
    assert found[0].tolist() == pytest.approx(expected, abs=1e-9)


@given(STEPS, st.floats(0, 1))
def test_with_lambda_1_an_advantage_is_the_reward_to_go_beyond_the_value(
    steps: list[tuple[float, float]], gamma: float
) -> None:
    rewards = torch.tensor([[reward for reward, _ in steps]], dtype=torch.float64)
    values = torch.tensor([[value for _, value in steps]], dtype=torch.float64)
    mask = torch.ones(1, len(steps))
    found = generalised_advantages(rewards, values, mask, gamma, 1.0)
    torch.testing.assert_close(found, rewards_to_go(rewards, mask, gamma) - values)


def test_rewards_to_go_by_hand() -> None:
    mask = torch.ones(1, 3)
    assert rewards_to_go(torch.tensor([[1.0, 2.0, 4.0]]), mask, 1.0).tolist() == [[7.0, 6.0, 4.0]]
    assert rewards_to_go(torch.tensor([[1.0, 2.0, 4.0]]), mask, 0.5).tolist() == [[3.0, 4.0, 4.0]]
