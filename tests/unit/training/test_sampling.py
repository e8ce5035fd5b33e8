"""Prompts whose samples are all alike make room for others; whatever belongs to a rollout goes along with it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nla_megatron.training.sampling import Scored, refilled
from nla_megatron.types import InjectionCount, Measured, Rollout, RolloutBatch, Scores

SAMPLES = 2


def scored(rewards_G2: list[tuple[float, float]], first_row: int) -> Scored:
    """Groups of two; texts, values and greedy rewards all tell the row that they belong to."""
    rollouts = tuple(
        Rollout(group, sample, first_row + group, (1, 2), (3,), (0.0,), f"{first_row + group}/{sample}", True)
        for group in range(len(rewards_G2))
        for sample in range(SAMPLES)
    )
    rewards = torch.tensor([reward for pair in rewards_G2 for reward in pair])
    rows = torch.tensor([float(rollout.row) for rollout in rollouts])
    measured = Measured(
        rollouts, tuple(rollout.text for rollout in rollouts), {"row": rows},
        tuple(str(rollout.row) for rollout in rollouts), {"asked": float(len(rollouts))},
    )  # fmt: skip
    batch = RolloutBatch(rollouts, InjectionCount(len(rollouts), len(rollouts)))
    return Scored(batch, measured, Scores(rewards, {"term": rewards * 10}), greedy=rows)


def alike(rewards_N: Tensor, groups_N: Tensor) -> Tensor:
    by_group = rewards_N.view(-1, SAMPLES)
    return (by_group[:, 0] == by_group[:, 1]).repeat_interleave(SAMPLES)


ALGORITHM: Any = SimpleNamespace(uninformative=alike)
pairs = st.lists(st.sampled_from([(0.0, 0.0), (1.0, 1.0), (0.0, 1.0), (2.0, 1.0)]), min_size=1, max_size=6)


@given(pairs, pairs)
def test_dull_prompts_are_replaced_by_fresh_ones_as_far_as_these_go(
    one: list[tuple[float, float]], other: list[tuple[float, float]]
) -> None:
    found = refilled(scored(one, 0), scored(other, 100), ALGORITHM)
    dull, fresh = sum(a == b for a, b in one), sum(a != b for a, b in other)
    assert found.replaced == min(dull, fresh)
    assert int(alike(found.scores.rewards, found.batch.groups).sum()) == SAMPLES * (dull - found.replaced)
    kept = [row for row, (a, b) in enumerate(one) if a != b]
    assert set(kept) <= {rollout.row for rollout in found.batch.rollouts}, "a prompt that tells something stays"


@given(pairs, pairs)
def test_texts_values_and_rewards_stay_with_their_rollouts(
    one: list[tuple[float, float]], other: list[tuple[float, float]]
) -> None:
    found = refilled(scored(one, 0), scored(other, 100), ALGORITHM)
    rewards = {(row, sample): pair[sample] for row, pair in enumerate(one) for sample in range(SAMPLES)}
    rewards |= {(100 + row, sample): pair[sample] for row, pair in enumerate(other) for sample in range(SAMPLES)}
    keys = [(rollout.group, rollout.sample) for rollout in found.batch.rollouts]
    assert keys == [(group, sample) for group in range(len(one)) for sample in range(SAMPLES)]
    assert found.measured.rollouts == found.batch.rollouts
    for index, rollout in enumerate(found.batch.rollouts):
        assert found.measured.texts[index] == rollout.text == f"{rollout.row}/{rollout.sample}"
        assert found.measured.references[index] == str(rollout.row)
        assert found.measured.values["row"][index] == rollout.row and found.greedy[index] == rollout.row
        assert found.scores.rewards[index] == rewards[rollout.row, rollout.sample]
        assert found.scores.terms["term"][index] == 10 * rewards[rollout.row, rollout.sample]


def test_what_was_asked_for_is_counted_over_all_rounds() -> None:
    found = refilled(scored([(0.0, 0.0)], 0), scored([(0.0, 1.0)], 100), ALGORITHM)
    assert found.batch.injections == InjectionCount(4, 4)
    assert found.measured.counts == {"asked": 4.0} and found.rounds == 2
