"""How losses of tokens become the loss of one optimizer step. Legend: N rollouts of the step, T tokens."""

from __future__ import annotations

from torch import Tensor


def token_weights(mask_NT: Tensor, mean: str, length: int | None) -> Tensor:
    """How much each token counts, (N, T).

    token:    1 / all tokens of the step, so long responses count more (DAPO, Yu et al. 2025, equation 8).
    sequence: 1 / (N * tokens of its response), so each response counts alike (GRPO, Shao et al. 2024, equation 3).
    constant: 1 / (N * length), a sum over a response's tokens up to a constant: the policy gradient itself, in which
              no token's weight depends on how long its response became (Dr. GRPO, Liu et al. 2025).
    """
    if mean == "token":
        return mask_NT / mask_NT.sum().clamp(min=1)
    rows = mask_NT.shape[0]
    if mean == "sequence":
        return mask_NT / mask_NT.sum(1, keepdim=True).clamp(min=1) / rows
    assert mean == "constant" and length is not None, mean
    return mask_NT / (rows * length)
