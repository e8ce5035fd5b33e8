"""What a step learns from: prompts drawn, answers sampled, measured and rewarded, dull prompts replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nla_megatron.algorithms import Algorithm
from nla_megatron.config.schema import RlConfig
from nla_megatron.parallel.world import World
from nla_megatron.rewards import Reward
from nla_megatron.rollout.engine import Engine
from nla_megatron.training.clock import PhaseClock
from nla_megatron.training.data_order import rows_of_step
from nla_megatron.training.recorder import RolloutRecorder
from nla_megatron.training.sides.base import Side
from nla_megatron.types import InjectionCount, Measured, RolloutBatch, Scores


@dataclass(frozen=True)
class Scored:
    """A step's rollouts, what was measured of them, and their rewards.

    `greedy` (N,): the reward of the greedy response to each one's prompt, where the algorithm asks. `rounds`: how often
    prompts were drawn. `replaced`: prompts that other ones took the place of.
    """

    batch: RolloutBatch
    measured: Measured
    scores: Scores
    greedy: Tensor | None = None
    rounds: int = 1
    replaced: int = 0


class Sampling:
    """Rollouts of a step, the same on every rank. Rows and seeds are a function of (seed, step, round)."""

    def __init__(
        self, config: RlConfig, side: Side, engine: Engine, algorithm: Algorithm, reward: Reward, world: World
    ):
        self.config, self.side, self.engine = config, side, engine
        self.algorithm, self.reward = algorithm, reward
        self.recorder = RolloutRecorder(config, world)

    def step(self, number: int, clock: PhaseClock) -> Scored:
        """Sample until every prompt tells something, for at most `algorithm.dynamic_sampling` rounds more."""
        recorded = self.recorder.replayed(number)
        if recorded is not None:
            return self._replayed(number, clock, recorded)
        found = self._round(number, 0, clock)
        for again in range(1, 1 + self.config.algorithm.dynamic_sampling):
            if not bool(self.algorithm.uninformative(found.scores.rewards, found.batch.groups).any()):
                break
            found = refilled(found, self._round(number, again, clock), self.algorithm)
        self.recorder.record(number, found.batch)
        return found

    def _round(self, number: int, again: int, clock: PhaseClock) -> Scored:
        config = self.config
        # Later rounds draw what later steps beyond the run's end would: no row of this round is drawn twice.
        drawn = number + again * config.steps
        rows = rows_of_step(self.side.n_rows, config.batch_size, drawn, config.seed)
        requests = self.side.requests(rows, drawn)
        with clock.phase("generate"):
            batch = self.engine.generate(requests, self.side.vectors, config.samples_per_prompt, number)
        measured, scores = self._scored(batch, number, clock)
        if not self.algorithm.needs.greedy:
            return Scored(batch, measured, scores)
        with clock.phase("generate"):
            best = self.engine.generate(
                [replace(request, greedy=True) for request in requests], self.side.vectors, 1, number
            )
        rewards_G = self._scored(best, number, clock)[1].rewards
        return Scored(batch, measured, scores, greedy=rewards_G[batch.groups])

    def _replayed(self, number: int, clock: PhaseClock, recorded: Sequence) -> Scored:
        with clock.phase("generate"):
            prompts = self.side.requests([rollout.row for rollout in recorded], number)
            positions = [prompt.position for prompt in prompts]
            strengths = [prompt.strengths for prompt in prompts]
            batch = self.engine.score(recorded, positions, self.side.vectors, number, strengths)
        return Scored(batch, *self._scored(batch, number, clock))

    def _scored(self, batch: RolloutBatch, number: int, clock: PhaseClock) -> tuple[Measured, Scores]:
        with clock.phase("score"):
            measured = self.side.measure(batch, number)
            return measured, self.reward(measured, number)


def refilled(found: Scored, more: Scored, algorithm: Algorithm) -> Scored:
    """Prompts of `found` that say nothing, replaced by prompts of `more` that do, as far as these go."""
    dull, fresh = (algorithm.uninformative(each.scores.rewards, each.batch.groups) for each in (found, more))
    both, offset = _together(found, more), int(found.batch.groups.max()) + 1
    free = sorted(set(found.batch.groups[dull].tolist()))
    taken = dict(zip(sorted(set(more.batch.groups[~fresh].tolist())), free, strict=False))
    place = {group: group for group in found.batch.groups.tolist() if group not in taken.values()}
    place |= {group + offset: into for group, into in taken.items()}
    chosen = [index for index, rollout in enumerate(both.batch.rollouts) if rollout.group in place]
    chosen.sort(key=lambda index: (place[both.batch.rollouts[index].group], both.batch.rollouts[index].sample))
    return _picked(both, chosen, place, replaced=found.replaced + len(taken))


def _together(one: Scored, other: Scored) -> Scored:
    """Both, one after the other; the second one's groups are numbered on."""
    offset = int(one.batch.groups.max()) + 1
    later = tuple(replace(rollout, group=rollout.group + offset) for rollout in other.batch.rollouts)
    rollouts = (*one.batch.rollouts, *later)
    first, second = one.measured, other.measured
    counts = {name: value + second.counts.get(name, 0.0) for name, value in first.counts.items()}
    injections = InjectionCount(
        one.batch.injections.injected + other.batch.injections.injected,
        one.batch.injections.expected + other.batch.injections.expected,
    )
    return Scored(
        batch=RolloutBatch(rollouts, injections),
        measured=Measured(
            rollouts, (*first.texts, *second.texts), _joined(first.values, second.values),
            (*first.references, *second.references), counts,
        ),
        scores=Scores(
            torch.cat([one.scores.rewards, other.scores.rewards]), _joined(one.scores.terms, other.scores.terms)
        ),
        greedy=None if one.greedy is None or other.greedy is None else torch.cat([one.greedy, other.greedy]),
        rounds=one.rounds + other.rounds,
    )  # fmt: skip


def _picked(both: Scored, chosen: list[int], place: Mapping[int, int], replaced: int) -> Scored:
    """Some rollouts, in this order and with their groups renamed."""
    rollouts = tuple(
        replace(both.batch.rollouts[index], group=place[both.batch.rollouts[index].group]) for index in chosen
    )
    measured, scores = both.measured, both.scores
    return replace(
        both,
        batch=replace(both.batch, rollouts=rollouts),
        measured=replace(
            measured,
            rollouts=rollouts,
            texts=tuple(measured.texts[index] for index in chosen),
            values={name: values[chosen] for name, values in measured.values.items()},
            references=tuple(measured.references[index] for index in chosen) if measured.references else (),
        ),
        scores=Scores(scores.rewards[chosen], {name: values[chosen] for name, values in scores.terms.items()}),
        greedy=None if both.greedy is None else both.greedy[chosen],
        replaced=replaced,
    )


def _joined(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.cat([values, other[name]]) for name, values in one.items()}
