"""GRPO's numbers by hand, against an independent reference, and their sign."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nla_megatron.algorithms import make_algorithm, register
from nla_megatron.algorithms.grpo import group_advantages, k3
from nla_megatron.config.schema import AlgorithmConfig
from nla_megatron.errors import ConfigError


def advantages(rewards: list[float], groups: list[int], normalise_std: bool = True) -> list[float]:
    return group_advantages(torch.tensor(rewards), torch.tensor(groups), normalise_std).tolist()


def test_advantages_by_hand() -> None:
    """Group 0: 1, 2, 3 with mean 2 and (sample) deviation 1; group 1: 10 and 14 with mean 12 and deviation √8."""
    rewards, groups = [1.0, 2.0, 3.0, 10.0, 14.0], [0, 0, 0, 1, 1]
    assert advantages(rewards, groups, normalise_std=False) == [-1.0, 0.0, 1.0, -2.0, 2.0]
    half = 1 / math.sqrt(2)
    assert advantages(rewards, groups) == pytest.approx([-1.0, 0.0, 1.0, -half, half], abs=1e-5)


def reference(rewards: np.ndarray, groups: np.ndarray, normalise_std: bool) -> np.ndarray:
    """The same formula, one group at a time."""
    out = np.empty(len(rewards))
    for group in set(groups.tolist()):
        own = rewards[groups == group].astype(np.float64)
        centred = own - own.mean()
        spread = own.std(ddof=1) if len(own) > 1 else 0.0
        out[groups == group] = centred / (spread + 1e-6) if normalise_std else centred
    return out


@given(
    st.lists(st.tuples(st.integers(0, 5), st.floats(-10, 10, width=32)), min_size=1, max_size=40),
    st.booleans(),
)
def test_advantages_equal_the_reference_for_any_grouping(pairs: list[tuple[int, float]], normalise_std: bool) -> None:
    """Groups come in any order, interleaved, of any size, and ids may be skipped."""
    groups, rewards = [group for group, _ in pairs], [reward for _, reward in pairs]
    expected = reference(np.asarray(rewards), np.asarray(groups), normalise_std)
    np.testing.assert_allclose(advantages(rewards, groups, normalise_std), expected, rtol=1e-4, atol=1e-5)


def test_interleaved_groups_are_told_apart_by_their_ids() -> None:
    assert advantages([1.0, 10.0, 3.0, 30.0], [0, 1, 0, 1], normalise_std=False) == [-1.0, -10.0, 1.0, 10.0]


def test_equal_rewards_of_two_groups_are_not_pooled() -> None:
    """Two groups of the same prompt, one all good and one all bad: pooled they would teach, apart they say nothing."""
    assert advantages([5.0, 5.0, 0.0, 0.0], [0, 0, 1, 1]) == [0.0, 0.0, 0.0, 0.0]


def test_a_group_of_one_or_of_equals_has_no_advantage() -> None:
    assert advantages([3.0, 7.0, 7.0], [0, 1, 1]) == [0.0, 0.0, 0.0]


def test_credit_is_fp32_and_obeys_the_configuration() -> None:
    rewards, groups = torch.tensor([0.0, 4.0]), torch.tensor([0, 0])
    plain = make_algorithm(AlgorithmConfig(normalise_std=False)).credit(rewards, groups).advantages
    assert plain.dtype == torch.float32 and plain.tolist() == [-2.0, 2.0]
    assert make_algorithm(AlgorithmConfig()).credit(rewards, groups).advantages[1] < 1


def test_one_step_makes_the_better_sample_likelier_and_the_worse_less_likely() -> None:
    """From rewards to parameters: two samples of two tokens, drawn from a table of logits."""
    algorithm = make_algorithm(AlgorithmConfig())
    tokens_BT = torch.tensor([[0, 1], [2, 3]])
    logits_TV = torch.zeros(2, 4, requires_grad=True)

    def logprobs() -> torch.Tensor:
        return logits_TV.log_softmax(-1)[torch.arange(2), tokens_BT]

    credit = algorithm.credit(torch.tensor([-0.3, -1.2]), torch.tensor([0, 0]))
    assert credit.advantages[0] > 0 > credit.advantages[1]
    before_BT = logprobs()
    loss_BT, _ = algorithm.token_loss(before_BT, before_BT.detach(), before_BT.detach(), credit.advantages)
    [gradient_TV] = torch.autograd.grad(loss_BT.sum(), logits_TV)
    with torch.no_grad():
        logits_TV -= 0.1 * gradient_TV
        change_BT = logprobs() - before_BT
    assert (change_BT[0] > 0).all() and (change_BT[1] < 0).all()


def token_loss(
    ratio: float, advantage: float, reference: float | None = None, **options: Any
) -> tuple[float, float, dict[str, float]]:
    """(loss, gradient with respect to the log-prob, statistics) of one token."""
    logprob = torch.tensor([[math.log(ratio) - 1.0]], requires_grad=True)
    other = None if reference is None else torch.tensor([[reference]])
    loss, statistics = make_algorithm(AlgorithmConfig(**options)).token_loss(
        logprob, torch.tensor([[-1.0]]), other, torch.tensor([advantage])
    )
    [gradient] = torch.autograd.grad(loss.sum(), logprob)
    return loss.item(), gradient.item(), {name: value.item() for name, value in statistics.items()}


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, 0.0),
        (1.25, 2.0, -2.5, -2.5, 0.0),  # within 1 + clip_high
        (1.5, 2.0, -2.6, 0.0, 1.0),  # good enough already: no further push
        (1.5, -2.0, 3.0, 3.0, 1.0),  # a bad sample that became likelier is pushed back in full
        (0.85, -2.0, 1.8, 0.0, 1.0),  # below 1 - clip_low: bad and already less likely
        (0.85, 2.0, -1.7, -1.7, 1.0),  # a good sample that became less likely is pushed back in full
        (0.95, -2.0, 1.9, 1.9, 0.0),
    ],
)
def test_clipping_by_hand_with_bounds_that_differ(
    ratio: float, advantage: float, loss: float, gradient: float, clipped: float
) -> None:
    found = token_loss(ratio, advantage, clip_low=0.1, clip_high=0.3)
    assert found[:2] == pytest.approx((loss, gradient), abs=1e-5)
    assert found[2] == {"clipped": clipped}


def test_loss_adds_the_weighted_k3_and_reports_it() -> None:
    """One token at ratio 1, so log-prob -1, against a reference of -1 + ln 2: k3 = 2 - ln 2 - 1."""
    kl = 1 - math.log(2)
    loss, gradient, statistics = token_loss(1.0, 3.0, reference=-1.0 + math.log(2), kl_coef=0.5)
    assert loss == pytest.approx(-3.0 + 0.5 * kl, abs=1e-6)
    assert gradient == pytest.approx(-3.0 + 0.5 * (1 - 2), abs=1e-6)  # d k3 / d logprob = 1 - exp(d)
    assert statistics == pytest.approx({"clipped": 0.0, "kl": kl}, abs=1e-6)


def test_token_loss_has_one_number_per_token_and_one_advantage_per_row() -> None:
    logprobs_BT = torch.full((2, 3), -1.0)
    loss_BT, statistics = make_algorithm(AlgorithmConfig()).token_loss(
        logprobs_BT, logprobs_BT, logprobs_BT, torch.tensor([1.0, -4.0])
    )
    assert loss_BT.tolist() == [[-1.0] * 3, [4.0] * 3]
    assert {name: tuple(values.shape) for name, values in statistics.items()} == {"clipped": (2, 3), "kl": (2, 3)}


@given(st.floats(-30, 0, width=32), st.floats(-30, 0, width=32))
def test_k3_is_never_negative_and_zero_at_equality(a: float, b: float) -> None:
    policy, other = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    assert k3(policy, other, 12.0) >= 0
    assert k3(policy, policy, 12.0) == 0


def test_k3_by_hand_and_its_clamp() -> None:
    assert k3(torch.tensor(-1.0), torch.tensor(-3.0), 12.0).item() == pytest.approx(math.exp(-2) + 2 - 1)
    far = k3(torch.tensor(-30.0), torch.tensor(-1.0), 12.0).item()
    assert far == pytest.approx(math.exp(12) - 13)


def test_k3_pulls_the_policy_towards_the_reference() -> None:
    """As a loss its expected gradient is that of KL(policy || reference); k1's would be zero."""
    logits = torch.tensor([0.3, -0.5, 1.0], requires_grad=True)
    other = torch.tensor([-0.2, 0.4, 0.1]).log_softmax(-1)
    policy = logits.log_softmax(-1)
    [sampled] = torch.autograd.grad((policy.exp().detach() * k3(policy, other, 12.0)).sum(), logits, retain_graph=True)
    # Tokens drawn from the policy: the expectation of d k3 = (1 - q/p) d log p is minus the gradient of Σ q log p.
    [expected] = torch.autograd.grad(-(other.exp() * policy).sum(), logits)
    torch.testing.assert_close(sampled, expected)
    assert (logits - 0.5 * sampled).log_softmax(-1).sub(other).abs().sum() < policy.sub(other).abs().sum()


def test_an_unknown_algorithm_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"algorithm.name='ppo'[\s\S]*grpo"):
        make_algorithm(AlgorithmConfig(name="ppo"))


def test_a_name_is_taken_once() -> None:
    make_algorithm(AlgorithmConfig())
    with pytest.raises(ValueError, match="'grpo' is registered already"):
        register("grpo")(lambda config: make_algorithm(config))
    assert type(make_algorithm(AlgorithmConfig())).__name__ == "Grpo"
