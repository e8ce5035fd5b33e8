"""RLOO: REINFORCE over whole responses, with the mean reward of the prompt's other responses as baseline.

    A_i = r_i - mean of the other rewards of its group,   r_i = R_i - kl_coef * sum of KL_t (`kl_in: reward`)
    loss = -min(p_i A_i, clip(p_i, 1 - clip_low, 1 + clip_high) A_i), averaged over responses (`loss_mean: sequence`)

Kool et al., Buy 4 REINFORCE samples, get a baseline for free! (2019); Ahmadian et al., Back to basics (2024), equation
7. p_i, the ratio of the whole response's probability, is 1 in a step's first update, whose gradient is then
-A_i grad log policy(response); clipping bounds the updates after it.
"""

from __future__ import annotations

from torch import Tensor

from nla_megatron.algorithms import register
from nla_megatron.algorithms.advantages import check_finite, flat, group_advantages, to_tokens
from nla_megatron.algorithms.policy_gradient import PolicyGradient
from nla_megatron.algorithms.returns import token_rewards
from nla_megatron.algorithms.surrogates import clipped, response_log_ratio
from nla_megatron.types import Credit, PolicyTokens, Sampled


@register("rloo")
class Rloo(PolicyGradient):
    """Leave-one-out advantages; a response is one action."""

    baselines = ("leave_one_out",)
    least_samples = 2
    own_keys = ()

    def credit(self, sampled: Sampled) -> Credit:
        check_finite(sampled.rewards)
        rewards_NT, statistics = token_rewards(sampled, self.config)
        advantages_N = group_advantages(rewards_NT.sum(1), sampled.groups, normalise_std=False, leave_one_out=True)
        statistics["flat_groups"] = float(flat(sampled.rewards, sampled.groups).double().mean())
        return Credit(to_tokens(advantages_N, sampled.mask), statistics=statistics)

    def surrogate(self, tokens: PolicyTokens) -> tuple[Tensor, Tensor]:
        ratio_BT = response_log_ratio(tokens, mean=False)
        return clipped(ratio_BT, tokens.advantages, self.config.clip_low, self.config.clip_high)
