"""REINFORCE++: PPO's loss without a critic; advantages are normalised over the whole step, not within a group.

    baseline: none    A_t = R - kl_coef * sum of KL_s over s >= t, standardised over all tokens of the step
    baseline: group   A_i = r_i - mean of its group, divided by the std of all responses of the step

Hu, Liu and Shen, REINFORCE++ (2025), the second as "REINFORCE++-baseline". The first wants the KL in the reward
(`kl_in: reward`, k1), the second in the loss (k2). Centred within groups, advantages have mean 0 over the step, so the
second only has to be scaled, and a group of equal rewards keeps its 0.
"""

from __future__ import annotations

import torch

from nla_megatron.algorithms import register
from nla_megatron.algorithms.advantages import check_finite, group_advantages, standardised, to_tokens
from nla_megatron.algorithms.policy_gradient import PolicyGradient
from nla_megatron.algorithms.returns import rewards_to_go, token_rewards
from nla_megatron.config.schema import AlgorithmConfig
from nla_megatron.types import Credit, Sampled


@register("reinforce_pp")
class ReinforcePlusPlus(PolicyGradient):
    """Advantages on the scale of the whole step, clipped ratio per token."""

    baselines = ("none", "group")
    own_keys = ("gamma",)

    def __init__(self, config: AlgorithmConfig):
        super().__init__(config)
        self.least_samples = 2 if self.baseline == "group" else 1

    def credit(self, sampled: Sampled) -> Credit:
        check_finite(sampled.rewards)
        rewards_NT, statistics = token_rewards(sampled, self.config)
        epsilon = self.config.advantage_epsilon
        if self.baseline == "group":
            centred_N = group_advantages(rewards_NT.sum(1), sampled.groups, normalise_std=False)
            scaled_N = standardised(centred_N, torch.ones_like(centred_N), epsilon).where(centred_N != 0, 0.0)
            return Credit(to_tokens(scaled_N, sampled.mask), statistics=statistics)
        returns_NT = rewards_to_go(rewards_NT, sampled.mask, self.config.gamma)
        return Credit(standardised(returns_NT, sampled.mask, epsilon), statistics=statistics)
