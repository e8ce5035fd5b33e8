"""Rewards along a response: KL on the way, the task's reward at the end. Legend: N rollouts of a step, T tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from nla_megatron.algorithms.kl import kl
from nla_megatron.config.schema import AlgorithmConfig
from nla_megatron.types import Sampled


def token_rewards(sampled: Sampled, config: AlgorithmConfig) -> tuple[Tensor, dict[str, float]]:
    """(N, T) fp64: the task's reward at the last token and, with `kl_in: reward`, -kl_coef * KL at each.

    Stiennon et al., Learning to summarize from human feedback (2020), section 3.4, token by token as in Ouyang et al.,
    InstructGPT (2022). The KL is that of the policy before the step's first update.

    Returns:
        The rewards, and what to log of them.
    """
    mask_NT = sampled.mask.double()
    rewards_NT = torch.zeros_like(mask_NT)
    statistics: dict[str, float] = {}
    if config.kl_in == "reward" and config.kl_coef > 0:
        assert sampled.old is not None and sampled.reference is not None
        kl_NT = kl(sampled.old.double(), sampled.reference.double(), config.kl, config.kl_clamp) * mask_NT
        rewards_NT -= config.kl_coef * kl_NT
        statistics["kl_in_reward"] = float(kl_NT.sum() / mask_NT.sum())
    last_N = (mask_NT * torch.arange(1, mask_NT.shape[1] + 1)).argmax(dim=1)
    rewards_NT[torch.arange(len(last_N)), last_N] += sampled.rewards.double()
    return rewards_NT, statistics


def generalised_advantages(
    rewards_NT: Tensor, values_NT: Tensor, mask_NT: Tensor, gamma: float, decay: float
) -> Tensor:
    """A_t = d_t + gamma * decay * A_t+1 with d_t = r_t + gamma * V_t+1 - V_t, (N, T) fp64; V is 0 after the end.

    Schulman et al., High-dimensional continuous control using generalized advantage estimation (2016), equation 16;
    `decay` is its lambda. With values 0 and decay 1 it is the discounted reward to go. Tokens outside the mask are not
    steps: what follows is handed over them.
    """
    advantages_NT = torch.zeros_like(mask_NT, dtype=torch.float64)
    later_N = torch.zeros(len(mask_NT), dtype=torch.float64)
    next_value_N = torch.zeros_like(later_N)
    for at in reversed(range(mask_NT.shape[1])):
        here = mask_NT[:, at] > 0
        value_N = values_NT[:, at].double()
        error_N = rewards_NT[:, at].double() + gamma * next_value_N - value_N
        later_N = torch.where(here, error_N + gamma * decay * later_N, later_N)
        next_value_N = torch.where(here, value_N, next_value_N)
        advantages_NT[:, at] = torch.where(here, later_N, 0.0)
    return advantages_NT


def rewards_to_go(rewards_NT: Tensor, mask_NT: Tensor, gamma: float) -> Tensor:
    """Sum of gamma^(s - t) * r_s over the tokens s from t to the end, (N, T) fp64."""
    return generalised_advantages(rewards_NT, torch.zeros_like(mask_NT), mask_NT, gamma, 1.0)
