"""Prompts whose samples are all alike make room for others; whatever belongs to a rollout goes along with it."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nla_megatron.training.sampling import Drawn, refilled
from nla_megatron.types import InjectionCount, Measured, Rollout, RolloutBatch

SAMPLES = 2


def drawn(rewards_G2: list[tuple[float, float]], first_row: int) -> Drawn:
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
        tuple(str(rollout.row) for rollout in rollouts), {"unreadable": 3.0},
    )  # fmt: skip
    batch = RolloutBatch(rollouts, InjectionCount(len(rollouts), len(rollouts)))
    return Drawn(batch, measured, {"term": rewards}, {"term": rows})


def alike(drawn: Drawn) -> Tensor:
    by_group = drawn.looked["term"].view(-1, SAMPLES)
    return (by_group[:, 0] == by_group[:, 1]).repeat_interleave(SAMPLES)


def filled(one: list[tuple[float, float]], other: list[tuple[float, float]]) -> Drawn:
    found, more = drawn(one, 0), drawn(other, 100)
    return refilled(found, alike(found), more, alike(more))


pairs = st.lists(st.sampled_from([(0.0, 0.0), (1.0, 1.0), (0.0, 1.0), (2.0, 1.0)]), min_size=1, max_size=6)


@given(pairs, pairs)
def test_dull_prompts_are_replaced_by_fresh_ones_as_far_as_these_go(
    one: list[tuple[float, float]], other: list[tuple[float, float]]
) -> None:
    found = filled(one, other)
    dull, fresh = sum(a == b for a, b in one), sum(a != b for a, b in other)
    assert found.replaced == min(dull, fresh)
    assert int(alike(found).sum()) == SAMPLES * (dull - found.replaced)
    kept = [row for row, (a, b) in enumerate(one) if a != b]
    assert set(kept) <= {rollout.row for rollout in found.batch.rollouts}, "a prompt that tells something stays"


@given(pairs, pairs)
def test_texts_values_and_rewards_stay_with_their_rollouts(
    one: list[tuple[float, float]], other: list[tuple[float, float]]
) -> None:
    found = filled(one, other)
    rewards = {(row, sample): pair[sample] for row, pair in enumerate(one) for sample in range(SAMPLES)}
    rewards |= {(100 + row, sample): pair[sample] for row, pair in enumerate(other) for sample in range(SAMPLES)}
    keys = [(rollout.group, rollout.sample) for rollout in found.batch.rollouts]
    assert keys == [(group, sample) for group in range(len(one)) for sample in range(SAMPLES)]
    assert found.measured.rollouts == found.batch.rollouts
    for index, rollout in enumerate(found.batch.rollouts):
        assert found.measured.texts[index] == rollout.text == f"{rollout.row}/{rollout.sample}"
        assert found.measured.references[index] == str(rollout.row)
        assert found.measured.values["row"][index] == rollout.row
        assert found.greedy is not None and found.greedy["term"][index] == rollout.row
        assert found.looked["term"][index] == rewards[rollout.row, rollout.sample]


def test_requests_are_counted_over_all_rounds_and_what_the_task_counts_once() -> None:
    found = filled([(0.0, 0.0)], [(0.0, 1.0)])
    assert found.batch.injections == InjectionCount(4, 4)
    assert found.measured.counts == {"unreadable": 3.0} and found.rounds == 2
