"""What algorithms share: ratios and their bounds, by hand, and how KL, entropy and correction join the loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from nla_megatron.types import Needs, PolicyTokens
from tests.support.sampled import made, random_tokens, sampled


def test_one_step_makes_the_better_sample_likelier_and_the_worse_less_likely() -> None:
    """From rewards to parameters: two samples of two tokens, drawn from a table of logits."""
    algorithm = made(kl_coef=0.0)
    tokens_BT = torch.tensor([[0, 1], [2, 3]])
    logits_TV = torch.zeros(2, 4, requires_grad=True)

    def logprobs() -> torch.Tensor:
        return logits_TV.log_softmax(-1)[torch.arange(2), tokens_BT]

    batch = sampled([-0.3, -1.2], [0, 0])
    advantages_BT = algorithm.credit(batch).advantages[:, 1:3]
    assert (advantages_BT[0] > 0).all() and (advantages_BT[1] < 0).all()
    before_BT = logprobs()
    tokens = PolicyTokens(
        before_BT, before_BT.detach(), before_BT.detach(), advantages_BT, torch.ones_like(advantages_BT)
    )
    loss_BT, _ = algorithm.token_loss(tokens)
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
    old, one = torch.tensor([[-1.0]]), torch.ones(1, 1)
    other = None if reference is None else torch.tensor([[reference]])
    tokens = PolicyTokens(logprob, old, old, torch.tensor([[advantage]]), one, other)
    loss, statistics = made(**options).token_loss(tokens)
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


@pytest.mark.parametrize(
    ("ratio", "weight", "clipped"), [(1.0, 1.0, 0.0), (1.2, 1.2, 0.0), (4.0, 1.5, 1.0), (0.01, 0.01, 0.0)]
)
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_cispo_bounds_a_tokens_weight_and_keeps_its_gradient(
    ratio: float, weight: float, clipped: float, advantage: float
) -> None:
    loss, gradient, statistics = token_loss(ratio, advantage, name="cispo", clip_low=1.0, clip_high=0.5)
    assert gradient == pytest.approx(-weight * advantage, rel=1e-5)
    assert loss == pytest.approx(-weight * advantage * (math.log(ratio) - 1), rel=1e-5)
    assert statistics == {"clipped": clipped}


def test_gspo_has_one_ratio_for_a_response_and_shares_its_gradient_out() -> None:
    """Two tokens that moved by 0.3 and -0.1: s = exp(0.1); each token's gradient is s * A / 2 of each of two losses."""
    old = torch.tensor([[0.0, -1.0, -2.0, 0.0]])
    moved = torch.tensor([[0.0, -0.7, -2.1, 0.0]], requires_grad=True)
    mask = torch.tensor([[0.0, 1.0, 1.0, 0.0]])
    algorithm = made("gspo", clip_low=0.2, clip_high=0.2, loss_mean="sequence", kl_coef=0.0)
    loss_BT, _ = algorithm.token_loss(PolicyTokens(moved, old, old, 3.0 * mask, mask))
    loss = (loss_BT * algorithm.token_weights(mask)).sum()
    assert loss.item() == pytest.approx(-3 * math.exp(0.1), abs=1e-6)
    [gradient] = torch.autograd.grad(loss, moved)
    each = -3 * math.exp(0.1) / 2
    assert gradient.tolist()[0] == pytest.approx([0.0, each, each, 0.0], abs=1e-6)


def test_loss_adds_the_weighted_kl_and_reports_it() -> None:
    """One token at ratio 1, so log-prob -1, against a reference of -1 + ln 2: k3 = 2 - ln 2 - 1."""
    kl = 1 - math.log(2)
    loss, gradient, statistics = token_loss(1.0, 3.0, reference=-1.0 + math.log(2), kl_coef=0.5)
    assert loss == pytest.approx(-3.0 + 0.5 * kl, abs=1e-6)
    assert gradient == pytest.approx(-3.0 + 0.5 * (1 - 2), abs=1e-6)  # d k3 / d logprob = 1 - exp(d)
    assert statistics == pytest.approx({"clipped": 0.0, "kl": kl}, abs=1e-6)


def test_a_kl_that_is_in_the_reward_is_reported_and_not_in_the_loss() -> None:
    loss, gradient, statistics = token_loss(1.0, 3.0, reference=-3.0, kl_coef=0.5, kl="k1", kl_in="reward")
    assert (loss, gradient) == pytest.approx((-3.0, -3.0), abs=1e-6)
    assert statistics["kl"] == pytest.approx(2.0)


def test_the_entropy_bonus_lowers_the_loss_of_uncertain_tokens() -> None:
    tokens = random_tokens([2, 3])
    plain, _ = made(kl_coef=0.0).token_loss(tokens)
    with_bonus, _ = made(kl_coef=0.0, entropy_coef=0.25).token_loss(tokens)
    assert tokens.entropy is not None
    torch.testing.assert_close(with_bonus, plain - 0.25 * tokens.entropy)
    [gradient] = torch.autograd.grad(with_bonus.sum(), tokens.entropy)
    assert (gradient == -0.25).all()


def test_the_correction_weighs_the_surrogate_and_neither_kl_nor_entropy() -> None:
    options: dict[str, Any] = {"kl_coef": 0.1, "entropy_coef": 0.2}
    tokens = random_tokens([2, 3])
    assert tokens.reference is not None
    surrogate, _ = made(kl_coef=0.0, kl_in="reward").token_loss(tokens)
    rest = made(**options).token_loss(tokens)[0] - surrogate
    corrected, statistics = made(correction="tis", correction_high=1.1, **options).token_loss(tokens)
    weight = (tokens.old - tokens.sampler).exp().clamp(max=1.1)
    torch.testing.assert_close(corrected, weight * surrogate + rest)
    torch.testing.assert_close(statistics["correction"], weight)


def test_statistics_are_one_number_per_token_without_gradient() -> None:
    tokens = random_tokens([2, 3])
    for name in ("grpo", "gspo", "cispo", "rloo", "reinforce", "reinforce_pp", "ppo"):
        loss, statistics = made(name, correction="icepop").token_loss(tokens)
        assert {"clipped", "kl", "correction", "correction_zero"} == set(statistics)
        assert {tuple(each.shape) for each in (loss, *statistics.values())} == {tuple(tokens.mask.shape)}
        assert loss.requires_grad and not any(each.requires_grad for each in statistics.values())


@pytest.mark.parametrize(
    ("options", "needs"),
    [
        ({"kl_coef": 0.0}, Needs()),
        ({"kl_coef": 0.1}, Needs(reference=True)),
        ({"kl_coef": 0.1, "kl_in": "reward", "kl": "k1"}, Needs(reference=True, old=True)),
        ({"kl_coef": 0.0, "kl_in": "reward"}, Needs()),
        ({"kl_coef": 0.0, "minibatches": 2}, Needs(old=True)),
        ({"kl_coef": 0.0, "epochs": 2}, Needs(old=True)),
        ({"kl_coef": 0.0, "entropy_coef": 0.1}, Needs(entropy=True)),
        ({"kl_coef": 0.0, "name": "ppo"}, Needs(values=True)),
        ({"kl_coef": 0.0, "name": "reinforce", "baseline": "scst"}, Needs(greedy=True)),
        ({"kl_coef": 0.0, "name": "reinforce", "baseline": "ema"}, Needs()),
    ],
)
def test_an_algorithm_asks_for_what_its_options_take_and_no_more(options: dict[str, Any], needs: Needs) -> None:
    assert made(**options).needs == needs


def test_dynamic_sampling_marks_groups_of_equal_rewards() -> None:
    rewards, groups = torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([0, 0, 1, 1])
    assert made(dynamic_sampling=2).uninformative(rewards, groups).tolist() == [True, True, False, False]
    assert not made().uninformative(rewards, groups).any()
