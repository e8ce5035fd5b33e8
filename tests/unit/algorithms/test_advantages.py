"""Baselines and scales of rewards, by hand and against one group at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nla_megatron.algorithms.advantages import check_finite, flat, group_advantages, standardised, to_tokens
from nla_megatron.errors import NotFinite

PAIRS = st.lists(st.tuples(st.integers(0, 5), st.floats(-10, 10, width=32)), min_size=1, max_size=40)


def advantages(
    rewards: list[float], groups: list[int], normalise_std: bool = True, leave_one_out: bool = False
) -> list[float]:
    return group_advantages(
        torch.tensor(rewards), torch.tensor(groups), normalise_std, leave_one_out=leave_one_out
    ).tolist()


def test_group_advantages_by_hand() -> None:
    """Group 0: 1, 2, 3 with mean 2 and (sample) deviation 1; group 1: 10 and 14 with mean 12 and deviation √8."""
    rewards, groups = [1.0, 2.0, 3.0, 10.0, 14.0], [0, 0, 0, 1, 1]
    assert advantages(rewards, groups, normalise_std=False) == [-1.0, 0.0, 1.0, -2.0, 2.0]
    half = 1 / math.sqrt(2)
    assert advantages(rewards, groups) == pytest.approx([-1.0, 0.0, 1.0, -half, half], abs=1e-5)


def test_leave_one_out_by_hand() -> None:
    """1 against the mean of 2 and 6; 2 against that of 1 and 6; 6 against that of 1 and 2."""
    found = advantages([1.0, 2.0, 6.0], [0, 0, 0], normalise_std=False, leave_one_out=True)
    assert found == pytest.approx([-3.0, -1.5, 4.5], abs=1e-6)


def reference(rewards: np.ndarray, groups: np.ndarray, normalise_std: bool, leave_one_out: bool) -> np.ndarray:
    """The same formulas, one rollout at a time."""
    out = np.empty(len(rewards))
    for index, group in enumerate(groups):
        own = rewards[groups == group].astype(np.float64)
        others = rewards[(groups == group) & (np.arange(len(rewards)) != index)].astype(np.float64)
        baseline = others.mean() if leave_one_out and len(others) else own.mean()
        deviation = own.std(ddof=1) if len(own) > 1 else 0.0
        out[index] = rewards[index] - baseline
        if normalise_std:
            out[index] /= deviation + 1e-6
    return out


@given(PAIRS, st.booleans(), st.booleans())
def test_advantages_equal_the_reference_for_any_grouping(
    pairs: list[tuple[int, float]], normalise_std: bool, leave_one_out: bool
) -> None:
    """Groups come in any order, interleaved, of any size, and ids may be skipped."""
    groups, rewards = [group for group, _ in pairs], [reward for _, reward in pairs]
    expected = reference(np.asarray(rewards), np.asarray(groups), normalise_std, leave_one_out)
    found = advantages(rewards, groups, normalise_std, leave_one_out)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_interleaved_groups_are_told_apart_by_their_ids() -> None:
    assert advantages([1.0, 10.0, 3.0, 30.0], [0, 1, 0, 1], normalise_std=False) == [-1.0, -10.0, 1.0, 10.0]


def test_equal_rewards_of_two_groups_are_not_pooled() -> None:
    """Two groups of the same prompt, one all good and one all bad: pooled they would teach, apart they say nothing."""
    assert advantages([5.0, 5.0, 0.0, 0.0], [0, 0, 1, 1]) == [0.0, 0.0, 0.0, 0.0]


@given(st.floats(-1e3, 1e3), st.integers(1, 9), st.booleans(), st.booleans())
def test_a_group_of_equals_has_exactly_no_advantage(
    reward: float, size: int, normalise_std: bool, leave_one_out: bool
) -> None:
    """Also in fp64, where the mean of three equal numbers need not be that number."""
    rewards = torch.full((size,), reward, dtype=torch.float64)
    found = group_advantages(rewards, torch.zeros(size, dtype=torch.int64), normalise_std, 1e-12, leave_one_out)
    assert found.tolist() == [0.0] * size


@given(PAIRS, st.floats(-100, 100, width=32), st.booleans(), st.booleans())
def test_a_shift_of_a_groups_rewards_changes_nothing(
    pairs: list[tuple[int, float]], shift: float, normalise_std: bool, leave_one_out: bool
) -> None:
    groups = torch.tensor([group for group, _ in pairs])
    # Quarters: the shifted rewards are exact, so that only the formula can make a difference.
    rewards = (torch.tensor([reward for _, reward in pairs], dtype=torch.float64) * 4).round() / 4
    moved = rewards + round(shift) * (groups == groups[0])
    options = (normalise_std, 1e-6, leave_one_out)
    torch.testing.assert_close(
        group_advantages(moved, groups, *options), group_advantages(rewards, groups, *options), atol=1e-5, rtol=1e-5
    )


@given(PAIRS, st.randoms(use_true_random=False), st.booleans(), st.booleans())
def test_the_order_of_rollouts_does_not_matter(
    pairs: list[tuple[int, float]], random: object, normalise_std: bool, leave_one_out: bool
) -> None:
    order = list(range(len(pairs)))
    random.shuffle(order)  # type: ignore[attr-defined]
    groups, rewards = [group for group, _ in pairs], [reward for _, reward in pairs]
    found = advantages(rewards, groups, normalise_std, leave_one_out)
    shuffled = advantages(
        [rewards[index] for index in order], [groups[index] for index in order], normalise_std, leave_one_out
    )
    assert shuffled == pytest.approx([found[index] for index in order], rel=1e-5, abs=1e-5)


def test_flat_groups_are_found_by_group() -> None:
    found = flat(torch.tensor([1.0, 2.0, 5.0, 5.0, 3.0]), torch.tensor([0, 0, 2, 2, 3]))
    assert found.tolist() == [False, False, True, True, True]


def test_standardised_counts_only_what_the_mask_has() -> None:
    """1, 2, 3 under the mask: mean 2, deviation 1; the hundred is nobody's."""
    values, mask = torch.tensor([[1.0, 2.0], [100.0, 3.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    torch.testing.assert_close(standardised(values, mask, 0.0), torch.tensor([[-1.0, 0.0], [0.0, 1.0]]))


def test_one_number_per_response_reaches_all_of_its_tokens_and_no_other() -> None:
    found = to_tokens(torch.tensor([2.0, -1.0]), torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]))
    assert found.tolist() == [[0.0, 2.0, 2.0], [-1.0, 0.0, 0.0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_reward_that_is_no_number_is_named_by_its_rollout(bad: float) -> None:
    with pytest.raises(NotFinite, match=r"of rollouts \[2\]"):
        check_finite(torch.tensor([0.0, 1.0, bad]))
