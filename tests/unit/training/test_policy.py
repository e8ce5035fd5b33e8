"""What of a step's rollouts goes into which update, and what several updates say together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nla_megatron.config.compose import compose
from nla_megatron.config.schema import AlgorithmConfig
from nla_megatron.models.batching import response_mask
from nla_megatron.parallel.world import World
from nla_megatron.training.clock import PhaseClock
from nla_megatron.training.module import Update
from nla_megatron.training.policy import means, minibatches, sampler_logprobs
from nla_megatron.training.rl import RlTrainer
from nla_megatron.types import Rollout
from tests.support.credited import PROMPTS, WrittenSampler, overrides, write_files


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 9), st.integers(1, 3))
def test_each_epoch_has_the_updates_asked_for_of_whole_groups(
    groups: int, samples: int, parts: int, epochs: int
) -> None:
    groups_N, parts = torch.arange(groups).repeat_interleave(samples), min(parts, groups)
    found = minibatches(groups_N, AlgorithmConfig(minibatches=parts, epochs=epochs), seed=3, number=5)
    assert len(found) == parts * epochs
    for epoch in range(epochs):
        mine = found[epoch * parts : (epoch + 1) * parts]
        assert sorted(index for part in mine for index in part) == list(range(groups * samples))
        sizes = [len(part) // samples for part in mine]
        assert max(sizes) - min(sizes) <= 1
        for part in mine:
            held = groups_N[part].tolist()
            assert all(held.count(group) == samples for group in held)


def test_later_epochs_have_an_order_of_their_own_that_the_seed_and_the_step_give() -> None:
    groups_N, config = torch.arange(16), AlgorithmConfig(minibatches=4, epochs=3)

    def epochs(seed: int, number: int) -> list[list[list[int]]]:
        found = minibatches(groups_N, config, seed, number)
        return [found[start : start + 4] for start in (0, 4, 8)]

    first, second, third = epochs(0, 0)
    assert first == [list(range(start, start + 4)) for start in (0, 4, 8, 12)]
    assert len({str(each) for each in (first, second, third)}) == 3
    assert epochs(0, 0) == [first, second, third]
    assert epochs(1, 0)[1:] != [second, third] != epochs(0, 1)[1:]


def test_the_samplers_logprobs_stand_where_their_tokens_are_predicted() -> None:
    rollouts = (
        Rollout(0, 0, 0, (7, 8, 9), (4, 5), (-0.5, -1.5), "", True),
        Rollout(0, 1, 0, (7,), (4, 5, 6), (-2.0, -3.0, -4.0), "", True),
    )
    mask = response_mask([3, 1], [5, 4], 5)
    assert sampler_logprobs(rollouts, mask).tolist() == [[0, 0, -0.5, -1.5, 0], [-2.0, -3.0, -4.0, 0, 0]]
    assert (sampler_logprobs(rollouts, mask) != 0).equal(mask > 0)


def test_several_updates_say_their_averages_and_the_largest_maximum() -> None:
    updates = tuple(Update({"loss": loss, "gap_max": gap}, 1.0, 0.1, False) for loss, gap in ((1.0, 5.0), (2.0, 3.0)))
    assert means(updates) == pytest.approx({"loss": 1.5, "gap_max": 5.0})
    assert means(()) == {}


def test_the_critic_learns_the_returns_of_each_minibatchs_own_rollouts(tmp_path: Path, world: World) -> None:
    """A fresh critic says 0 of every token, and a step of next to nothing leaves it there: its loss is R^2 / 2."""
    write_files(tmp_path)
    words = overrides(tmp_path, "single", "ppo", "lexical")
    words = [word for word in words if not word.startswith("critic_optim.lr=")]
    once = (f"algorithm.minibatches={PROMPTS}", "algorithm.epochs=1", "critic_optim.lr=1e-9")
    trainer = RlTrainer(compose("rl", [*words, *once]), world, WrittenSampler)
    scored = trainer.sampling.step(0, PhaseClock())
    sampled = trainer.learning.look(scored, 0)
    returns_NT = (1.0 + scored.batch.groups[:, None]) * sampled.mask
    credit = replace(trainer.algorithm.credit(sampled), returns=returns_NT)
    learned = trainer.learning.update(scored.batch, sampled, credit, 0)
    expected = [(1.0 + group) ** 2 / 2 for group in range(PROMPTS)]
    assert [update.statistics["loss"] for update in learned.critic] == pytest.approx(expected, rel=1e-4)
