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
from nla_megatron.rollout.requests import PromptRequest
from nla_megatron.training.clock import PhaseClock
from nla_megatron.training.data_order import rows_of_step
from nla_megatron.training.recorder import RolloutRecorder
from nla_megatron.training.sampler import Sampler
from nla_megatron.training.sides.base import Side
from nla_megatron.types import InjectionCount, Measured, Rollout, RolloutBatch, Scores

Looked = Mapping[str, Tensor]
"""What a reward saw of each rollout by itself, (N,) by the names of its parts."""


@dataclass(frozen=True)
class Drawn:
    """Rollouts, what was measured of them, and what the reward saw of each.

    `greedy`: what it saw of the greedy response to each one's prompt, where the algorithm asks. `rounds`: how often
    prompts were drawn. `replaced`: prompts that other ones took the place of.
    """

    batch: RolloutBatch
    measured: Measured
    looked: Looked
    greedy: Looked | None = None
    rounds: int = 1
    replaced: int = 0


@dataclass(frozen=True)
class Scored:
    """A step's rollouts with their rewards, each among all that the step learns from.

    `greedy` (N,): the reward of the greedy response to each one's prompt, where the algorithm asks. `rounds` and
    `replaced` as in `Drawn`.
    """

    batch: RolloutBatch
    measured: Measured
    scores: Scores
    greedy: Tensor | None
    rounds: int
    replaced: int


class Sampling:
    """Rollouts of a step, the same on every rank. Rows and seeds are a function of (seed, step, round)."""

    def __init__(
        self, config: RlConfig, side: Side, engine: Sampler, algorithm: Algorithm, reward: Reward, world: World
    ):
        self.config, self.side, self.engine = config, side, engine
        self.algorithm, self.reward = algorithm, reward
        self.recorder = RolloutRecorder(config, world, side.place)

    def step(self, number: int, clock: PhaseClock) -> Scored:
        """Sample until every prompt tells something, for at most `algorithm.dynamic_sampling` rounds more."""
        recorded = self.recorder.replayed(number)
        if recorded is not None:
            return self._settled(self._replayed(number, clock, recorded), number)
        found = self._round(number, 0, clock)
        for again in range(1, 1 + self.config.algorithm.dynamic_sampling):
            dull_N = self._dull(found, number)
            if not bool(dull_N.any()):
                break
            more = self._round(number, again, clock)
            found = refilled(found, dull_N, more, self._dull(more, number))
        self.recorder.record(number, found.batch)
        return self._settled(found, number)

    def _round(self, number: int, again: int, clock: PhaseClock) -> Drawn:
        config = self.config
        # Later rounds draw what later steps beyond the run's end would: no row of this round is drawn twice.
        drawn = number + again * config.steps
        rows = rows_of_step(self.side.n_rows, config.batch_size, drawn, config.seed)
        requests = self.side.requests(rows, drawn)
        with clock.phase("generate"):
            batch = self.engine.generate(requests, self.side.vectors, config.samples_per_prompt, number)
        return self._drawn(batch, requests, number, clock)

    def _replayed(self, number: int, clock: PhaseClock, recorded: Sequence[Rollout]) -> Drawn:
        with clock.phase("generate"):
            prompts = self.side.requests([rollout.row for rollout in recorded], number)
            batch = self.engine.score(recorded, prompts, self.side.vectors, number)
        first = {rollout.group: index for index, rollout in reversed(list(enumerate(recorded)))}
        asked = [prompts[first[group]].again(recorded[first[group]]) for group in sorted(first)]
        return self._drawn(batch, asked, number, clock)

    def _drawn(self, batch: RolloutBatch, requests: Sequence[PromptRequest], number: int, clock: PhaseClock) -> Drawn:
        measured, looked = self._looked(batch, number, clock)
        if not self.algorithm.needs.greedy:
            return Drawn(batch, measured, looked)
        with clock.phase("generate"):
            greedy = [replace(request, greedy=True) for request in requests]
            best = self.engine.generate(greedy, self.side.vectors, 1, number)
        _, seen = self._looked(best, number, clock)
        return Drawn(batch, measured, looked, {name: values_G[batch.groups] for name, values_G in seen.items()})

    def _looked(self, batch: RolloutBatch, number: int, clock: PhaseClock) -> tuple[Measured, Looked]:
        with clock.phase("score"):
            measured = self.side.measure(batch, number)
            return measured, self.reward.look(measured)

    def _dull(self, drawn: Drawn, number: int) -> Tensor:
        """(N,) bool: rollouts of prompts that tell nothing."""
        rewards_N = self.reward.scores(drawn.looked, drawn.measured, number).rewards
        return self.algorithm.uninformative(rewards_N, drawn.batch.groups)

    def _settled(self, drawn: Drawn, number: int) -> Scored:
        """The rewards of what the step learns from, after which their moving averages move."""
        looked, measured, greedy = drawn.looked, drawn.measured, drawn.greedy
        scores = self.reward.scores(looked, measured, number)
        best = None if greedy is None else self.reward.scores(greedy, measured, number, among=looked).rewards
        self.reward.settle(looked)
        return Scored(drawn.batch, measured, scores, best, drawn.rounds, drawn.replaced)


def refilled(found: Drawn, dull_N: Tensor, more: Drawn, more_dull_N: Tensor) -> Drawn:
    """Prompts of `found` that say nothing, replaced by prompts of `more` that do, as far as these go."""
    offset = int(found.batch.groups.max()) + 1
    free = sorted(set(found.batch.groups[dull_N].tolist()))
    taken = dict(zip(sorted(set(more.batch.groups[~more_dull_N].tolist())), free, strict=False))
    place = {group: group for group in found.batch.groups.tolist() if group not in taken.values()}
    place |= {group + offset: into for group, into in taken.items()}
    both = _together(found, more, offset)
    chosen = [index for index, rollout in enumerate(both.batch.rollouts) if rollout.group in place]
    chosen.sort(key=lambda index: (place[both.batch.rollouts[index].group], both.batch.rollouts[index].sample))
    return replace(_picked(both, chosen, place), replaced=found.replaced + len(taken))


def _together(one: Drawn, other: Drawn, offset: int) -> Drawn:
    """Both, one after the other; the second one's groups are numbered on from `offset`."""
    later = tuple(replace(rollout, group=rollout.group + offset) for rollout in other.batch.rollouts)
    rollouts = (*one.batch.rollouts, *later)
    first, second = one.measured, other.measured
    injections = InjectionCount(
        one.batch.injections.injected + other.batch.injections.injected,
        one.batch.injections.expected + other.batch.injections.expected,
    )
    return Drawn(
        batch=RolloutBatch(rollouts, injections),
        measured=Measured(
            rollouts, (*first.texts, *second.texts), _joined(first.values, second.values),
            (*first.references, *second.references), first.counts,
        ),
        looked=_joined(one.looked, other.looked),
        greedy=None if one.greedy is None or other.greedy is None else _joined(one.greedy, other.greedy),
        rounds=one.rounds + other.rounds,
    )  # fmt: skip


def _picked(both: Drawn, chosen: list[int], place: Mapping[int, int]) -> Drawn:
    """Some rollouts, in this order and with their groups renamed."""
    rollouts = tuple(
        replace(both.batch.rollouts[index], group=place[both.batch.rollouts[index].group]) for index in chosen
    )
    measured = replace(
        both.measured,
        rollouts=rollouts,
        texts=tuple(both.measured.texts[index] for index in chosen),
        values=_of(both.measured.values, chosen),
        references=tuple(both.measured.references[index] for index in chosen) if both.measured.references else (),
    )
    return replace(
        both,
        batch=replace(both.batch, rollouts=rollouts),
        measured=measured,
        looked=_of(both.looked, chosen),
        greedy=None if both.greedy is None else _of(both.greedy, chosen),
    )


def _joined(one: Looked, other: Looked) -> dict[str, Tensor]:
    return {name: torch.cat([values, other[name]]) for name, values in one.items()}


def _of(values: Looked, chosen: list[int]) -> dict[str, Tensor]:
    return {name: each[chosen] for name, each in values.items()}
