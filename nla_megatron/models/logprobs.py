"""Log-probabilities and entropies from vocabulary-parallel logits. Legend: B rows, T tokens, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor

from nla_megatron.models.batching import next_token_targets
from nla_megatron.types import Microbatch


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """The logits of the distribution at a temperature in fp32, whatever their shape; at 1 those of fp32 as they are.

    They are divided after the cast: in bf16 the quotient would be rounded, by 0.02 nats of a log-prob on average.
    """
    logits = logits.float()
    return logits if temperature == 1.0 else logits / temperature


def token_logprobs(logits_BTV: Tensor, targets_BT: Tensor, temperature: float = 1.0) -> Tensor:
    """log p(target) under logits / temperature, (B, T) fp32, differentiable, the same on every TP rank.

    The logits are consumed: Megatron's vocabulary-parallel cross-entropy works in place.
    """
    return -tensor_parallel.vocab_parallel_cross_entropy(tempered(logits_BTV, temperature), targets_BT)


def token_entropy(logits_BTV: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of the next-token distribution in nats, (B, T) fp32, differentiable, the same on every TP rank.

    With gradients enabled it keeps a copy of the logits; where it is only logged, call it without.
    """
    return _Entropy.apply(logits_BTV, temperature)


class _Entropy(torch.autograd.Function):
    """H = -sum p log p over the vocabulary rows of all TP ranks, and dH / dlogit = -p (log p + H) / temperature."""

    @staticmethod
    def forward(context: Any, logits_BTV: Tensor, temperature: float) -> Tensor:
        # Rows that only pad the vocabulary hold the least finite number: below it, 0 times it would be no number.
        logits = tempered(logits_BTV, temperature).clamp(min=torch.finfo(torch.float32).min)
        group = parallel_state.get_tensor_model_parallel_group()
        top = logits.amax(dim=-1)
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
        logits = logits - top[..., None]
        weights = logits.exp()
        # A padding row may be infinitely far below the top by now.
        sums = torch.stack([weights.sum(-1), (weights * logits.clamp(min=torch.finfo(torch.float32).min)).sum(-1)])
        dist.all_reduce(sums, group=group)
        entropy_BT = sums[0].log() - sums[1] / sums[0]
        context.save_for_backward(logits - sums[0].log()[..., None], entropy_BT)
        context.temperature, context.dtype = temperature, logits_BTV.dtype
        return entropy_BT

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logprobs, entropy_BT = context.saved_tensors
        logprobs = logprobs.clamp(min=torch.finfo(torch.float32).min)
        slope = logprobs.exp() * (logprobs + entropy_BT[..., None])
        return (-slope * (gradients[0] / context.temperature)[..., None]).to(context.dtype), None


def response_logprobs(temperature: float) -> Callable[[Tensor, Microbatch], Tensor]:
    """A collector of log p(token) at the positions that predict a response token, 0 elsewhere: (B, T)."""

    def collect(logits_BTV: Tensor, part: Microbatch) -> Tensor:
        return token_logprobs(logits_BTV, next_token_targets(part.ids), temperature) * part.fields["mask"]

    return collect
