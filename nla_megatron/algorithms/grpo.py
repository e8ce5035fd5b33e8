"""GRPO: a response is as good as it is better than the other responses to its prompt.

    A_i = (r_i - mean of its group) / (std of its group + advantage_epsilon)      the same for each of its tokens
    loss_t = -min(ratio_t A, clip(ratio_t, 1 - clip_low, 1 + clip_high) A) + kl_coef * KL_t

Shao et al., DeepSeekMath (2024), equations 3 and 4. Its options are other papers' algorithms:

- Dr. GRPO (Liu et al., Understanding R1-Zero-like training, 2025): `normalise_std: false`, `loss_mean: constant`.
- Leave-one-out: `baseline: leave_one_out`, the mean of the other responses of the group.
- DAPO (Yu et al. 2025): `clip_high` above `clip_low`, `loss_mean: token`, `dynamic_sampling`, no KL.
"""

from __future__ import annotations

from nla_megatron.algorithms import register
from nla_megatron.algorithms.advantages import check_finite, flat, group_advantages, to_tokens
from nla_megatron.algorithms.policy_gradient import PolicyGradient
from nla_megatron.algorithms.returns import token_rewards
from nla_megatron.types import Credit, Sampled


@register("grpo")
class Grpo(PolicyGradient):
    """Group-relative advantages, clipped ratio per token."""

    baselines = ("group", "leave_one_out")
    own_keys = ("normalise_std",)
    least_samples = 2

    def credit(self, sampled: Sampled) -> Credit:
        check_finite(sampled.rewards)
        rewards_NT, statistics = token_rewards(sampled, self.config)
        advantages_N = group_advantages(
            rewards_NT.sum(1),
            sampled.groups,
            self.config.normalise_std,
            self.config.advantage_epsilon,
            leave_one_out=self.baseline == "leave_one_out",
        )
        statistics["flat_groups"] = float(flat(sampled.rewards, sampled.groups).double().mean())
        return Credit(to_tokens(advantages_N, sampled.mask), statistics=statistics)
