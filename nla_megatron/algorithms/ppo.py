"""PPO: a critic says what is expected after each token, and a token's advantage is how much better it went.

    d_t = r_t + gamma V_t+1 - V_t,   A_t = d_t + gamma * gae_lambda * A_t+1,   return_t = A_t + V_t
    policy:  -min(ratio_t A_t, clip(ratio_t, 1 - clip_low, 1 + clip_high) A_t)
    critic:  1/2 max((V - return)^2, (clip(V, V_old - value_clip, V_old + value_clip) - return)^2)

Schulman et al., Proximal policy optimization (2017), equation 7, with generalized advantage estimation (2016); the
clipped value loss is of the authors' implementation. r_t is the task's reward at the last token and, with
`kl_in: reward`, -kl_coef * KL_t at each. With `whiten` advantages are standardised over all tokens of the step.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from nla_megatron.algorithms import register
from nla_megatron.algorithms.advantages import check_finite, standardised
from nla_megatron.algorithms.policy_gradient import PolicyGradient
from nla_megatron.algorithms.returns import generalised_advantages, token_rewards
from nla_megatron.types import Credit, Needs, Sampled


@register("ppo")
class Ppo(PolicyGradient):
    """Generalised advantages over a critic's values, clipped policy and value losses."""

    own_keys = ("gamma", "gae_lambda", "value_clip", "whiten")

    def wanted(self) -> Needs:
        return replace(super().wanted(), values=True)

    def credit(self, sampled: Sampled) -> Credit:
        check_finite(sampled.rewards)
        assert sampled.values is not None
        config, mask_NT = self.config, sampled.mask
        rewards_NT, statistics = token_rewards(sampled, config)
        values_NT = sampled.values.double() * mask_NT
        advantages_NT = generalised_advantages(rewards_NT, values_NT, mask_NT, config.gamma, config.gae_lambda)
        returns_NT = (advantages_NT + values_NT) * mask_NT
        statistics["value"] = float(values_NT.sum() / mask_NT.sum())
        statistics["explained_variance"] = _explained(values_NT, returns_NT, mask_NT)
        if config.whiten:
            advantages_NT = standardised(advantages_NT, mask_NT, config.advantage_epsilon)
        return Credit(advantages_NT.float(), returns_NT.float(), statistics)

    def value_loss(self, values_BT: Tensor, old_BT: Tensor, returns_BT: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        error_BT = (values_BT - returns_BT).square()
        statistics = {"value_error": error_BT.detach()}
        if (bound := self.config.value_clip) is None:
            return error_BT / 2, statistics
        bounded_BT = values_BT.maximum(old_BT - bound).minimum(old_BT + bound)
        bounded_error_BT = (bounded_BT - returns_BT).square()
        statistics["value_clipped"] = (bounded_error_BT > error_BT).float()
        return error_BT.maximum(bounded_error_BT) / 2, statistics


def _explained(values_NT: Tensor, returns_NT: Tensor, mask_NT: Tensor) -> float:
    """1 - var(return - value) / var(return) over tokens; 0 where returns do not vary."""
    here = mask_NT > 0
    spread = float(returns_NT[here].var(correction=0))
    return 1 - float((returns_NT - values_NT)[here].var(correction=0)) / spread if spread > 0 else 0.0
