"""What a reward is worth beside others: baselines and scales. Legend: N rollouts of a step, T tokens.

Everything is computed in fp64 over the whole step, which every rank has, and handed on as fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nla_megatron.errors import NotFinite


def check_finite(rewards_N: Tensor) -> None:
    """Raises NotFinite: a reward is NaN or infinite; one of them would spoil its whole group or batch."""
    bad = [index for index, fine in enumerate(rewards_N.isfinite().tolist()) if not fine]
    if bad:
        raise NotFinite(
            f"rewards that are not finite, of rollouts {bad[:8]}{' and more' if len(bad) > 8 else ''}",
            "a finite reward for every rollout",
            "correct the reward: give a failed response its own finite value",
        )


def _per_group(values_N: Tensor, groups_N: Tensor, reduce: str) -> Tensor:
    """A group's sum, amax or amin of each rollout's group, (N,)."""
    out = torch.zeros(int(groups_N.max()) + 1, dtype=values_N.dtype)
    return out.scatter_reduce(0, groups_N, values_N, reduce, include_self=False)[groups_N]


def flat(rewards_N: Tensor, groups_N: Tensor) -> Tensor:
    """(N,) bool: all rewards of the rollout's group are equal, so that it teaches nothing."""
    return _per_group(rewards_N, groups_N, "amax") == _per_group(rewards_N, groups_N, "amin")


def group_advantages(
    rewards_N: Tensor,
    groups_N: Tensor,
    normalise_std: bool,
    epsilon: float = 1e-6,
    leave_one_out: bool = False,
) -> Tensor:
    """(r - baseline) / (std of its group + epsilon), (N,) fp32; exactly 0 where a group's rewards are all equal.

    Args:
        rewards_N: any numbers; fp64 keeps their differences.
        groups_N: explicit ids, in any order.
        normalise_std: else only the baseline is taken off. The deviation is the sample's (n - 1).
        leave_one_out: the baseline is the mean of the *other* rollouts of the group, n / (n - 1) times as far away as
            the group's own mean.
    """
    rewards = rewards_N.double()
    size = _per_group(torch.ones_like(rewards), groups_N, "sum")
    others = (size - 1).clamp(min=1)
    out = rewards - _per_group(rewards, groups_N, "sum") / size
    spread = (_per_group(out**2, groups_N, "sum") / others).sqrt()
    if leave_one_out:
        out = out * size / others
    if normalise_std:
        out = out / (spread + epsilon)
    return out.masked_fill(flat(rewards, groups_N), 0.0).float()


def standardised(values: Tensor, mask: Tensor, epsilon: float) -> Tensor:
    """(x - mean) / (std + epsilon) over everything under the mask, fp32, 0 elsewhere."""
    values, mask = values.double(), mask.double()
    count = mask.sum()
    centred = (values - (values * mask).sum() / count) * mask
    spread = ((centred**2).sum() / (count - 1).clamp(min=1)).sqrt()
    return (centred / (spread + epsilon)).float()


def to_tokens(values_N: Tensor, mask_NT: Tensor) -> Tensor:
    """One number of a rollout for each of its tokens, (N, T) fp32."""
    return values_N.float()[:, None] * mask_NT
