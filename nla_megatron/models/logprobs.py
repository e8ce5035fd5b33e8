"""Log-probabilities and entropies from vocabulary-parallel logits. Legend: B rows, T tokens, V vocabulary."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor


def token_logprobs(logits_BTV: Tensor, targets_BT: Tensor, temperature: float = 1.0) -> Tensor:
    """log p(target) under logits / temperature, (B, T) fp32, differentiable, the same on every TP rank.

    The logits are consumed: Megatron's vocabulary-parallel cross-entropy works in place.
    """
    if temperature != 1.0:
        logits_BTV = logits_BTV / temperature
    losses_BT = tensor_parallel.vocab_parallel_cross_entropy(logits_BTV, targets_BT)
    return -losses_BT


@torch.no_grad()
def token_entropy(logits_BTV: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of the next-token distribution in nats, (B, T) fp32; for the logs, so without gradient."""
    # Rows that only pad the vocabulary hold the least finite number: below it, 0 times it would be no number.
    logits = (logits_BTV.float() / temperature).clamp(min=torch.finfo(torch.float32).min)
    group = parallel_state.get_tensor_model_parallel_group()
    top = logits.amax(dim=-1)
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    weights = (logits - top[..., None]).exp()
    sums = torch.stack([weights.sum(-1), (weights * logits).sum(-1)])
    dist.all_reduce(sums, group=group)
    return sums[0].log() + top - sums[1] / sums[0]
