"""Losses of the warm starts, as sums over the global batch. Legend: B rows, T tokens, V vocabulary."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from nla_megatron.models.batching import next_token_targets
from nla_megatron.models.logprobs import token_logprobs
from nla_megatron.models.pipeline import Loss
from nla_megatron.training.reconstruction_loss import make_reconstruction_loss, reconstruction
from nla_megatron.types import Microbatch

__all__ = ["cross_entropy", "make_reconstruction_loss", "reconstruction"]


def cross_entropy(total_tokens: float) -> Loss:
    """Mean negative log-likelihood over all masked tokens of the global batch (field `mask` (B, T))."""

    def loss(logits_BTV: Tensor, part: Microbatch) -> tuple[Tensor, Mapping[str, Tensor]]:
        mask_BT = part.fields["mask"] * part.weights[:, None]
        value = -(token_logprobs(logits_BTV, next_token_targets(part.ids)) * mask_BT).sum() / total_tokens
        return value, {"loss": value.detach()}

    return loss
