"""What is minimised in place of the negative expected reward, per token. Legend: B rows, T tokens.

Ratios compare the policy that learns with the one before the step's first update. Each surrogate returns the loss
(B, T), and where the ratio lay outside its bounds, (B, T) fp32.
"""

from __future__ import annotations

from torch import Tensor

from nla_megatron.types import PolicyTokens


def token_log_ratio(tokens: PolicyTokens) -> Tensor:
    """log policy - log old per token, (B, T), 0 outside the mask."""
    return (tokens.logprobs - tokens.old) * tokens.mask


def response_log_ratio(tokens: PolicyTokens, mean: bool) -> Tensor:
    """The same of whole responses, for each of their tokens, (B, T): the sum over tokens, or their mean."""
    total_B1 = token_log_ratio(tokens).sum(1, keepdim=True)
    if mean:
        total_B1 = total_B1 / tokens.mask.sum(1, keepdim=True).clamp(min=1)
    return total_B1.expand_as(tokens.mask)


def clipped(log_ratio_BT: Tensor, advantages_BT: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r, 1 - low, 1 + high) A): Schulman et al., Proximal policy optimization (2017), equation 7.

    Bounds that differ are DAPO's "clip-higher" (Yu et al. 2025): unlikely tokens get more room to grow.
    """
    ratio_BT = log_ratio_BT.exp()
    bounded_BT = ratio_BT.clamp(1 - low, 1 + high)
    loss_BT = -(ratio_BT * advantages_BT).minimum(bounded_BT * advantages_BT)
    return loss_BT, (ratio_BT != bounded_BT).float().detach()


def weighted_score(tokens: PolicyTokens, low: float, high: float) -> tuple[Tensor, Tensor]:
    """-stop_gradient(clip(r)) A log p: every token keeps its gradient, its weight is bounded (CISPO's form)."""
    ratio_BT = token_log_ratio(tokens).detach().exp()
    bounded_BT = ratio_BT.clamp(1 - low, 1 + high)
    return -bounded_BT * tokens.advantages * tokens.logprobs, (ratio_BT != bounded_BT).float()
