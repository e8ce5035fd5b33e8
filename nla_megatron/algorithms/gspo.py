"""GSPO: GRPO whose ratio and clipping are of whole responses, which is what the reward is given to.

    s_i = exp(mean over its tokens of (log policy - log old))
    loss = -min(s_i A_i, clip(s_i, 1 - clip_low, 1 + clip_high) A_i), averaged over responses (`loss_mean: sequence`)

Zheng et al., Group sequence policy optimization (2025), equations 5 and 7. Advantages are GRPO's. A response's mean
log-ratio stays near 0, so the bounds are of the order of 1e-4.
"""

from __future__ import annotations

from torch import Tensor

from nla_megatron.algorithms import register
from nla_megatron.algorithms.grpo import Grpo
from nla_megatron.algorithms.surrogates import clipped, response_log_ratio
from nla_megatron.types import PolicyTokens


@register("gspo")
class Gspo(Grpo):
    """GRPO with one ratio for all tokens of a response."""

    def surrogate(self, tokens: PolicyTokens) -> tuple[Tensor, Tensor]:
        ratio_BT = response_log_ratio(tokens, mean=True)
        return clipped(ratio_BT, tokens.advantages, self.config.clip_low, self.config.clip_high)
