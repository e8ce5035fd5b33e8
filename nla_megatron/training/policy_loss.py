"""Losses of RL: the algorithm's numbers per token, under its weights, over the whole global batch.

Legend: B rows of a microbatch, N rows of the global batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor

from nla_megatron.algorithms import Algorithm
from nla_megatron.models.batching import next_token_targets
from nla_megatron.models.logprobs import token_entropy, token_logprobs
from nla_megatron.models.pipeline import Loss
from nla_megatron.types import Microbatch, PolicyTokens


def policy_loss(algorithm: Algorithm, temperature: float, total_tokens: float) -> Loss:
    """The policy's loss over batches with the fields `mask`, `token_weights`, `advantages` and `sampler`, each (N, T).

    Args:
        temperature: the sampler's.
        total_tokens: the mask's sum over the global batch; statistics are means over those tokens.

    The fields `old` and `reference` are optional. Without `old` the batch is updated on once, straight after it was
    sampled: the old policy is the present one. `logprob_gap*` compare the trainer's log-probs with the sampler's, token
    by token: the health of the loop. The statistics' names are `policy_statistics(algorithm)`.
    """

    def loss(logits_BTV: Tensor, part: Microbatch) -> tuple[Tensor, Mapping[str, Tensor]]:
        fields = {name: values * part.weights[:, None] for name, values in part.fields.items() if values.dim() == 2}
        mask_BT = fields["mask"]
        with nullcontext() if algorithm.needs.entropy else torch.no_grad():
            entropy_BT = token_entropy(logits_BTV, temperature) * mask_BT
        # Outside the mask everything is 0, so that no ratio of two log-probs there can overflow.
        logprobs_BT = token_logprobs(logits_BTV, next_token_targets(part.ids), temperature) * mask_BT
        tokens = PolicyTokens(
            logprobs=logprobs_BT,
            old=fields.get("old", logprobs_BT.detach()) * mask_BT,
            sampler=fields["sampler"] * mask_BT,
            advantages=fields["advantages"],
            mask=mask_BT,
            reference=fields["reference"] * mask_BT if "reference" in fields else None,
            entropy=entropy_BT if algorithm.needs.entropy else None,
        )
        losses_BT, per_token = algorithm.token_loss(tokens)
        value = (losses_BT * fields["token_weights"]).sum()
        gap_BT = (tokens.old - tokens.sampler).abs()
        means = {"entropy": entropy_BT.detach(), "logprob_gap": gap_BT, **_absent(mask_BT), **per_token}
        statistics = {name: (values * mask_BT).sum() / total_tokens for name, values in means.items()}
        return value, {"loss": value.detach(), "logprob_gap_max": gap_BT.max(), **statistics}

    return loss


def _absent(mask_BT: Tensor) -> dict[str, Tensor]:
    """What is reported also by algorithms that have no such thing."""
    return {"kl": torch.zeros_like(mask_BT), "clipped": torch.zeros_like(mask_BT)}


def policy_statistics(algorithm: Algorithm) -> tuple[str, ...]:
    """Names of what `policy_loss` reports, the same on every rank: asked of the algorithm with one made-up token."""
    one = torch.zeros(1, 1)
    needs = algorithm.needs
    _, per_token = algorithm.token_loss(
        PolicyTokens(
            logprobs=one, old=one, sampler=one, advantages=one, mask=one + 1,
            reference=one if needs.reference else None, entropy=one if needs.entropy else None,
        )
    )  # fmt: skip
    names = ("loss", "kl", "entropy", "clipped", "logprob_gap", "logprob_gap_max")
    return (*names, *(name for name in per_token if name not in names))


def value_loss(algorithm: Algorithm, total_tokens: float) -> Loss:
    """The critic's loss over batches with the fields `mask`, `token_weights`, `old_values` and `returns`, each (N, T).

    The model's output is a value per token, (B, T); `total_tokens` as in `policy_loss`. The statistics' names are
    `value_statistics(algorithm)`.
    """

    def loss(values_BT: Tensor, part: Microbatch) -> tuple[Tensor, Mapping[str, Tensor]]:
        fields = {name: values * part.weights[:, None] for name, values in part.fields.items() if values.dim() == 2}
        mask_BT = fields["mask"]
        losses_BT, per_token = algorithm.value_loss(values_BT * mask_BT, fields["old_values"], fields["returns"])
        value = (losses_BT * fields["token_weights"]).sum()
        statistics = {name: (values * mask_BT).sum() / total_tokens for name, values in per_token.items()}
        return value, {"loss": value.detach(), **statistics}

    return loss


def value_statistics(algorithm: Algorithm) -> tuple[str, ...]:
    """Names of what `value_loss` reports."""
    one = torch.zeros(1, 1)
    return ("loss", *algorithm.value_loss(one, one, one)[1])
