"""The three estimates by hand, their expectations over a whole vocabulary, and their gradients as losses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nla_megatron.algorithms.kl import kl
from nla_megatron.types import PolicyTokens
from tests.support.sampled import made

LOGITS, OTHER = [0.3, -0.5, 1.0], torch.tensor([-0.2, 0.4, 0.1], dtype=torch.float64).log_softmax(-1)


def policy_of(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1)


@pytest.mark.parametrize(("estimator", "expected"), [("k1", 2.0), ("k2", 2.0), ("k3", math.exp(-2) + 2 - 1)])
def test_a_token_that_the_policy_finds_likelier_by_hand(estimator: str, expected: float) -> None:
    """log policy -1, log reference -3: d = -2."""
    assert kl(torch.tensor(-1.0), torch.tensor(-3.0), estimator, 12.0).item() == pytest.approx(expected)


@pytest.mark.parametrize(("estimator", "expected"), [("k1", -12.0), ("k2", 72.0), ("k3", math.exp(12) - 13)])
def test_the_clamp_bounds_the_difference_and_not_the_estimate(estimator: str, expected: float) -> None:
    assert kl(torch.tensor(-30.0), torch.tensor(-1.0), estimator, 12.0).item() == pytest.approx(expected)


@given(st.floats(-30, 0, width=32), st.floats(-30, 0, width=32))
def test_k2_and_k3_are_never_negative_and_all_are_zero_at_equality(a: float, b: float) -> None:
    policy, other = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    for estimator in ("k2", "k3"):
        assert kl(policy, other, estimator, 12.0) >= 0
    assert [float(kl(policy, policy, estimator, 12.0)) for estimator in ("k1", "k2", "k3")] == [0.0] * 3


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_the_kl_in_expectation(estimator: str) -> None:
    policy = policy_of(torch.tensor(LOGITS, dtype=torch.float64))
    expected = torch.nn.functional.kl_div(OTHER, policy, log_target=True, reduction="sum")
    torch.testing.assert_close((policy.exp() * kl(policy, OTHER, estimator, 12.0)).sum(), expected)


def expected_gradient(estimator: str, weighted: bool) -> Tensor:
    """Of the loss of one on-policy token with respect to the logits, in expectation over what the policy draws."""
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    logprobs = policy_of(logits)[None]
    still, one = logprobs.detach(), torch.ones(1, 3, dtype=torch.float64)
    tokens = PolicyTokens(logprobs, still, still, 0 * one, one, OTHER[None])
    loss, _ = made(kl=estimator, kl_weighted=weighted, kl_coef=1.0).token_loss(tokens)
    return torch.autograd.grad((loss * still.exp()).sum(), logits)[0]


def kl_gradient(reverse: bool) -> Tensor:
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    policy = policy_of(logits)
    terms = policy.exp() * (policy - OTHER) if reverse else OTHER.exp() * (OTHER - policy)
    return torch.autograd.grad(terms.sum(), logits)[0]


def test_as_a_loss_k2_has_the_gradient_of_the_kl_and_k3_that_of_the_other_way_round() -> None:
    torch.testing.assert_close(expected_gradient("k2", weighted=False), kl_gradient(reverse=True))
    torch.testing.assert_close(expected_gradient("k3", weighted=False), kl_gradient(reverse=False))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_weighted_by_the_ratio_k1_and_k3_have_the_gradient_of_the_kl(estimator: str) -> None:
    torch.testing.assert_close(expected_gradient(estimator, weighted=True), kl_gradient(reverse=True))


def test_a_bare_k1_in_the_loss_would_have_no_gradient() -> None:
    """Why the configuration refuses it: each token's is the score, whose expectation is zero."""
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    policy = policy_of(logits)
    loss = (policy.detach().exp() * kl(policy, OTHER, "k1", 12.0)).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], torch.zeros(3, dtype=torch.float64))
