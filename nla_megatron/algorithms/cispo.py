"""CISPO: GRPO that bounds a token's importance weight and never drops its gradient.

    loss_t = -stop_gradient(clip(ratio_t, 1 - clip_low, 1 + clip_high)) A log policy_t

MiniMax, MiniMax-M1 (2025), equations 4 and 5. Advantages are GRPO's, losses are averaged over tokens. The paper sets no
lower bound: `clip_low: 1`.
"""

from __future__ import annotations

from torch import Tensor

from nla_megatron.algorithms import register
from nla_megatron.algorithms.grpo import Grpo
from nla_megatron.algorithms.surrogates import weighted_score
from nla_megatron.types import PolicyTokens


@register("cispo")
class Cispo(Grpo):
    """GRPO with a bounded weight on every token's score."""

    def surrogate(self, tokens: PolicyTokens) -> tuple[Tensor, Tensor]:
        return weighted_score(tokens, self.config.clip_low, self.config.clip_high)
