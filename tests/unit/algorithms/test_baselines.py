"""RLOO, REINFORCE and REINFORCE++: their advantages by hand, what they remember, and that order does not matter."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nla_megatron.errors import NotFinite
from nla_megatron.types import Sampled
from tests.support.sampled import made, per_rollout, random_tokens, sampled

ALL = ("grpo", "gspo", "cispo", "rloo", "reinforce", "reinforce_pp", "ppo")


def advantages(name: str, batch: Sampled, **options: Any) -> list[float]:
    return per_rollout(made(name, **options).credit(batch).advantages, batch.mask)


def test_rloo_by_hand_and_as_grpo_left_out() -> None:
    batch = sampled([1.0, 2.0, 6.0, 4.0, 4.0], [0, 0, 0, 1, 1], [1, 3, 2, 2, 2])
    assert advantages("rloo", batch) == pytest.approx([-3.0, -1.5, 4.5, 0.0, 0.0], abs=1e-6)
    loo = advantages("grpo", batch, baseline="leave_one_out", normalise_std=False)
    assert loo == advantages("rloo", batch)


def test_rloo_equals_reinforce_minus_the_mean_of_the_others() -> None:
    rewards = [0.5, -1.0, 3.0, 0.25]
    found = advantages("rloo", sampled(rewards, [0] * 4))
    plain = advantages("reinforce", sampled(rewards, [0] * 4), baseline="none")
    others = [(sum(rewards) - reward) / 3 for reward in rewards]
    assert found == pytest.approx([a - b for a, b in zip(plain, others, strict=True)], abs=1e-6)


def test_reinforces_baselines_by_hand() -> None:
    batch = sampled([1.0, 2.0, 6.0], [0, 1, 2], [1, 3, 2], greedy=torch.tensor([0.5, 3.0, 6.0]))
    assert advantages("reinforce", batch, baseline="none") == [1.0, 2.0, 6.0]
    assert advantages("reinforce", batch, baseline="mean") == [-2.0, -1.0, 3.0]
    assert advantages("reinforce", batch, baseline="scst") == [0.5, -1.0, 0.0]


def test_the_moving_average_is_of_the_steps_before() -> None:
    """Means 2, 10, 0 at decay 0.75: the baseline is 2 (its own), then 2, then 0.75 * 2 + 0.25 * 10 = 4."""
    algorithm = made("reinforce", baseline="ema", ema_decay=0.75)
    steps = [sampled(rewards, [0, 1]) for rewards in ([1.0, 3.0], [10.0, 10.0], [-1.0, 1.0])]
    credits = [algorithm.credit(step) for step in steps]
    found = [per_rollout(credit.advantages, step.mask) for credit, step in zip(credits, steps, strict=True)]
    assert found == [[-1.0, 1.0], [8.0, 8.0], [-5.0, -3.0]]
    assert [credit.statistics["baseline"] for credit in credits] == [2.0, 2.0, 4.0]
    assert algorithm.state() == {"average": 3.0}


def test_a_resumed_moving_average_goes_on_as_if_nothing_had_happened() -> None:
    steps = [sampled(rewards, [0, 1]) for rewards in ([0.1, 0.7], [0.3, 0.4], [0.9, 0.2])]
    whole, first, second = (made("reinforce", baseline="ema") for _ in range(3))
    expected = [whole.credit(step).advantages for step in steps]
    for step in steps[:2]:
        first.credit(step)
    second.load_state(first.state())
    assert torch.equal(second.credit(steps[2]).advantages, expected[2])


@pytest.mark.parametrize("name", ALL)
def test_the_state_of_a_fresh_algorithm_is_empty_and_can_be_loaded(name: str) -> None:
    algorithm = made(name)
    algorithm.load_state(algorithm.state())
    assert algorithm.state() == {}


def test_reinforce_is_the_score_times_the_advantage_also_on_old_samples() -> None:
    """Its gradient is -A * ratio, however far the policy has moved."""
    tokens = random_tokens([2, 3], step=2.0)
    loss_BT, statistics = made("reinforce", kl_coef=0.0).token_loss(tokens)
    ratio_BT = (tokens.logprobs - tokens.old).exp().detach()
    [gradient_BT] = torch.autograd.grad(loss_BT.sum(), tokens.logprobs)
    torch.testing.assert_close(gradient_BT, -tokens.advantages * ratio_BT)
    assert float(statistics["clipped"].sum()) == 0
    on_policy = replace(tokens, old=tokens.logprobs.detach())
    loss_BT, _ = made("reinforce", kl_coef=0.0).token_loss(on_policy)
    torch.testing.assert_close(loss_BT, -tokens.advantages * tokens.logprobs)


def test_reinforce_pp_by_hand() -> None:
    """KL (k1) of 1 and 2 in the first response, -1 in the second, coefficient 0.5; rewards 3 and 0.

    To go: 3 - 0.5 * 3 = 1.5 and 3 - 0.5 * 2 = 2; 0.5. Mean 4/3, squares 1/36 + 16/36 + 25/36 = 7/6, deviation √(7/12).
    """
    options = {"kl": "k1", "kl_in": "reward", "kl_coef": 0.5}
    old, reference = [[-1.0, -1.0], [-2.0]], [[-2.0, -3.0], [-1.0]]
    batch = sampled([3.0, 0.0], [0, 1], [2, 1], old=old, reference=reference)
    found = made("reinforce_pp", **options).credit(batch).advantages
    deviation = math.sqrt(7 / 12)
    expected = [[0, 1 / 6 / deviation, 4 / 6 / deviation, 0], [0, -5 / 6 / deviation, 0, 0]]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_reinforce_pp_with_a_group_baseline_by_hand() -> None:
    """Centred: -1, 1, -3, 3, 0, 0; mean 0, squares 20, deviation √(20 / 5) = 2, whatever the lengths are."""
    batch = sampled([1.0, 3.0, 0.0, 6.0, 5.0, 5.0], [0, 0, 1, 1, 2, 2], [1, 4, 2, 3, 1, 2])
    found = advantages("reinforce_pp", batch, baseline="group", advantage_epsilon=0.0)
    assert found == pytest.approx([-0.5, 0.5, -1.5, 1.5, 0.0, 0.0], abs=1e-6)
    assert found[4:] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("name", "options"),
    [("grpo", {}), ("rloo", {}), ("reinforce", {"baseline": "mean"}), ("reinforce", {"baseline": "none"})],
)
def test_a_kl_in_the_reward_lowers_a_whole_response(name: str, options: dict[str, Any]) -> None:
    """As if the task had given so much less."""
    old, reference = [[-1.0, -1.0], [-2.0, -1.0]], [[-2.0, -3.0], [-1.0, -1.0]]
    with_kl = sampled([3.0, 0.0], [0, 0], [2, 2], old=old, reference=reference)
    lower = sampled([3.0 - 0.5 * 3, 0.0 + 0.5 * 1], [0, 0], [2, 2])
    found = advantages(name, with_kl, kl="k1", kl_in="reward", kl_coef=0.5, **options)
    assert found == pytest.approx(advantages(name, lower, kl_coef=0.0, **options), abs=1e-6)


def in_order(batch: Sampled, order: list[int]) -> Sampled:
    given = {item.name: getattr(batch, item.name) for item in fields(batch)}
    return replace(batch, **{name: values[order] for name, values in given.items() if values is not None})


@pytest.mark.parametrize("name", ALL)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4), st.floats(-4, 4, width=32)), min_size=1, max_size=10),
       st.randoms(use_true_random=False))  # fmt: skip
@settings(max_examples=20, deadline=None)
def test_the_order_of_rollouts_does_not_matter(name: str, rollouts: list[tuple[int, int, float]], random: Any) -> None:
    lengths = [length for _, length, _ in rollouts]
    some = torch.Generator().manual_seed(0)
    plain = sampled([reward for *_, reward in rollouts], [group for group, *_ in rollouts], lengths)

    def noise() -> Tensor:
        return torch.randn(plain.mask.shape, generator=some) * plain.mask

    batch = replace(plain, old=noise(), reference=noise(), values=noise(), greedy=noise()[:, 0])
    algorithm = made(name, kl="k1", kl_in="reward")
    order = list(range(len(rollouts)))
    random.shuffle(order)
    found = algorithm.credit(in_order(batch, order)).advantages
    torch.testing.assert_close(found, algorithm.credit(batch).advantages[order], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_stops_the_step(name: str, bad: float) -> None:
    batch = sampled([1.0, bad], [0, 0], values=[[0.0, 0.0], [0.0, 0.0]])
    with pytest.raises(NotFinite, match=r"of rollouts \[1\]"):
        made(name).credit(batch)


def test_a_greedy_reward_that_is_no_number_stops_the_step() -> None:
    batch = sampled([1.0, 2.0], [0, 1], greedy=torch.tensor([0.0, float("nan")]))
    with pytest.raises(NotFinite):
        made("reinforce", baseline="scst").credit(batch)


@pytest.mark.parametrize("name", ALL)
def test_advantages_are_fp32_per_token_and_zero_outside_the_mask(name: str) -> None:
    batch = sampled([1.0, 2.0, 0.0], [0, 0, 1], [1, 4, 2], values=[[0.0], [0.0] * 4, [0.0] * 2])
    credit = made(name).credit(batch)
    assert credit.advantages.dtype == torch.float32 and credit.advantages.shape == batch.mask.shape
    assert float((credit.advantages * (1 - batch.mask)).abs().max()) == 0
    assert all(isinstance(value, float) for value in credit.statistics.values())
    assert (credit.returns is not None) == (name == "ppo")
