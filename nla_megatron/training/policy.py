"""The policy's part of a step: what it said of its rollouts before the update, and the update over them.

Legend: N rollouts of a step, T tokens of the longest sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nla_megatron.algorithms import Algorithm
from nla_megatron.config.schema import AlgorithmConfig, RlConfig
from nla_megatron.models.batching import Batch
from nla_megatron.models.critic import response_values
from nla_megatron.models.logprobs import response_logprobs
from nla_megatron.parallel.world import World
from nla_megatron.training.logprob_gap import GapCheck
from nla_megatron.training.module import TrainModule, Update
from nla_megatron.training.policy_loss import policy_loss, policy_statistics, value_loss, value_statistics
from nla_megatron.training.reference import Reference
from nla_megatron.training.sampling import Scored
from nla_megatron.training.sides.base import Side
from nla_megatron.types import Credit, Rollout, RolloutBatch, Sampled


@dataclass(frozen=True)
class Learned:
    """The updates of a step, in their order."""

    policy: tuple[Update, ...]
    critic: tuple[Update, ...] = ()


class PolicyLearning:
    """Updates of the policy, and of the critic where the algorithm has one."""

    def __init__(
        self, config: RlConfig, side: Side, algorithm: Algorithm, critic: TrainModule | None,
        reference: Reference | None, world: World,
    ):  # fmt: skip
        self.config, self.side, self.algorithm, self.critic = config, side, algorithm, critic
        self.reference, self.check_gap = reference, GapCheck(config, side.tokenizer, world, side.place)

    def look(self, scored: Scored, number: int) -> Sampled:
        """Log-probs and values of all rollouts before anything is updated."""
        rollouts = scored.batch.rollouts
        batch = self.side.batch(rollouts, number, {})
        mask_NT, needs = batch.fields["mask"], self.algorithm.needs
        collect = response_logprobs(self.config.rollout.temperature)
        reference = values = None
        if self.reference is not None:
            with self.reference.in_place():
                reference = self.side.policy.rows(batch, collect, batch.longest)
        if self.critic is not None:
            values = self.critic.rows(batch, response_values, batch.longest)
        return Sampled(
            rewards=scored.scores.rewards,
            groups=scored.batch.groups,
            mask=mask_NT,
            sampler=sampler_logprobs(rollouts, mask_NT),
            old=self.side.policy.rows(batch, collect, batch.longest) if needs.old else None,
            reference=reference,
            values=values,
            greedy=scored.greedy,
        )

    def update(self, batch: RolloutBatch, sampled: Sampled, credit: Credit, number: int) -> Learned:
        """One optimizer step per minibatch of whole groups, `algorithm.epochs` times over all of them."""
        fields = {"advantages": credit.advantages, "sampler": sampled.sampler}
        optional = {"old": sampled.old, "reference": sampled.reference}
        fields |= {name: values for name, values in optional.items() if values is not None}
        policy, critic = [], []
        for chosen in minibatches(sampled.groups, self.config.algorithm, self.config.seed, number):
            rollouts = [batch.rollouts[index] for index in chosen]
            weights = self.algorithm.token_weights(sampled.mask[chosen])
            mine = {name: values[chosen] for name, values in fields.items()} | {"token_weights": weights}
            policy.append(self._update_policy(rollouts, self.side.batch(rollouts, number, mine), number))
            if self.critic is not None:
                critic.append(self._update_critic(rollouts, sampled, credit, weights, chosen, number))
        if self.reference is not None:
            self.reference.follow()
        return Learned(tuple(policy), tuple(critic))

    def _update_policy(self, rollouts: list[Rollout], batch: Batch, number: int) -> Update:
        total, temperature = float(batch.fields["mask"].sum()), self.config.rollout.temperature
        loss = policy_loss(self.algorithm, temperature, total)

        def compared() -> Tensor:
            """The log-probs that the loss compares with the sampler's."""
            old = batch.fields.get("old")
            return self.side.policy.rows(batch, response_logprobs(temperature), batch.longest) if old is None else old

        check = partial(self.check_gap, rollouts, compared, number)
        return self.side.policy.update(batch, loss, policy_statistics(self.algorithm), number, check=check)

    def _update_critic(
        self, rollouts: list[Rollout], sampled: Sampled, credit: Credit, weights: Tensor, chosen: list[int], number: int
    ) -> Update:
        assert self.critic is not None and sampled.values is not None and credit.returns is not None
        fields = {"old_values": sampled.values[chosen], "returns": credit.returns[chosen], "token_weights": weights}
        batch = self.side.batch(rollouts, number, fields)
        loss = value_loss(self.algorithm, float(batch.fields["mask"].sum()))
        return self.critic.update(batch, loss, value_statistics(self.algorithm), number)


def minibatches(groups_N: Tensor, algorithm: AlgorithmConfig, seed: int, number: int) -> list[list[int]]:
    """Rollouts of each optimizer step of step `number`, whole groups in parts whose sizes differ by one at most.

    Later epochs go through the groups in an order of their own.
    """
    found, count = [], int(groups_N.max()) + 1
    for epoch in range(algorithm.epochs):
        order = np.random.default_rng([seed, 6, number, epoch]).permutation(count) if epoch else np.arange(count)
        for part in np.array_split(order, algorithm.minibatches):
            found.append(torch.isin(groups_N, torch.from_numpy(part)).nonzero()[:, 0].tolist())
    return found


def sampler_logprobs(rollouts: tuple[Rollout, ...], mask_NT: Tensor) -> Tensor:
    """The sampler's log-probs (N, T) at the positions that predict their tokens."""
    out = torch.zeros_like(mask_NT)
    for index, rollout in enumerate(rollouts):
        first = len(rollout.prompt_ids) - 1
        out[index, first : first + len(rollout.logprobs)] = torch.tensor(rollout.logprobs)
    return out


def means(updates: tuple[Update, ...]) -> dict[str, Any]:
    """Statistics of several updates as one: averages, and the largest of the maxima."""
    names = updates[0].statistics if updates else {}
    found = {}
    for name in names:
        values = [update.statistics[name] for update in updates]
        found[name] = max(values) if name.endswith("_max") else sum(values) / len(values)
    return found
