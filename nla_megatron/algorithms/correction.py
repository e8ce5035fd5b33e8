"""Importance correction: the sampler computes with other kernels than the trainer, so it is another policy.

With rho_t = trainer / sampler, the probability of token t under each before the step's first update, a token's policy
loss is multiplied by

    tis             min(rho_t, high)                      Yao et al., truncated importance sampling (2025)
    icepop          rho_t if low <= rho_t <= high else 0  Ring team, IcePop (2025)
    sequence_mask   rho if low <= rho <= high else 0, with rho the product of a response's rho_t: Liu et al., When
                    speed kills stability (2025), masked sequence-level importance sampling

Legend: B rows, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def correction_weights(
    old_BT: Tensor, sampler_BT: Tensor, mask_BT: Tensor, kind: str, low: float, high: float
) -> Tensor:
    """What each token's policy loss is multiplied by, (B, T), without gradient; 1 outside the mask and for "none"."""
    if kind == "none":
        return torch.ones_like(mask_BT)
    difference_BT = ((old_BT - sampler_BT) * mask_BT).detach()
    if kind == "tis":
        return difference_BT.exp().clamp(max=high)
    if kind == "sequence_mask":
        difference_BT = difference_BT.sum(1, keepdim=True).expand_as(mask_BT)
    else:
        assert kind == "icepop", kind
    ratio_BT = difference_BT.exp()
    kept_BT = (ratio_BT >= low) & (ratio_BT <= high)
    return ratio_BT.masked_fill(~kept_BT, 0.0).where(mask_BT > 0, 1.0)
