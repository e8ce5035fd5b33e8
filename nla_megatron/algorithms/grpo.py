"""GRPO: a sample is as good as it is better than the other samples of its prompt.

Shao et al., DeepSeekMath (2024), equations 3 and 4, with token-mean loss; k3 is Schulman's KL estimator.
Legend: N rollouts, B rows of a microbatch, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nla_megatron.algorithms import register
from nla_megatron.config.schema import AlgorithmConfig
from nla_megatron.types import Credit


def group_advantages(rewards_N: Tensor, groups_N: Tensor, normalise_std: bool) -> Tensor:
    """(r - mean of its group) / (std of its group + 1e-6), fp32; groups by their explicit ids."""
    rewards = rewards_N.double()
    count = int(groups_N.max()) + 1
    size = torch.zeros(count, dtype=torch.float64).index_add_(0, groups_N, torch.ones_like(rewards))
    mean = torch.zeros(count, dtype=torch.float64).index_add_(0, groups_N, rewards) / size
    centred = rewards - mean[groups_N]
    if normalise_std:
        square = torch.zeros(count, dtype=torch.float64).index_add_(0, groups_N, centred**2)
        centred = centred / ((square / (size - 1).clamp(min=1)).sqrt()[groups_N] + 1e-6)
    return centred.float()


def k3(logprobs: Tensor, reference: Tensor, clamp: float) -> Tensor:
    """exp(d) - d - 1, d = reference - policy, clamped: unbiased for KL(policy || reference), never below 0."""
    difference = (reference - logprobs).clamp(-clamp, clamp)
    return difference.exp() - difference - 1


@register("grpo")
class Grpo:
    """Group-relative advantages, clipped ratio, k3 in the loss."""

    def __init__(self, config: AlgorithmConfig):
        self.config = config

    def credit(self, rewards_N: Tensor, groups_N: Tensor) -> Credit:
        return Credit(group_advantages(rewards_N, groups_N, self.config.normalise_std))

    def token_loss(
        self, logprobs_BT: Tensor, old_BT: Tensor, reference_BT: Tensor | None, advantages_B: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss per token (B, T), to be summed under the response mask, and per-token statistics."""
        config = self.config
        ratio = (logprobs_BT - old_BT).exp()
        clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        advantages = advantages_B[:, None]
        loss = -torch.minimum(ratio * advantages, clipped * advantages)
        statistics = {"clipped": (ratio != clipped).float().detach()}
        if reference_BT is not None:
            kl = k3(logprobs_BT, reference_BT, config.kl_clamp)
            loss = loss + config.kl_coef * kl
            statistics["kl"] = kl.detach()
        return loss, statistics
