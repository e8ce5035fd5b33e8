"""The AV's loss in RL: the algorithm's numbers per token, averaged over all response tokens of the global batch."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from nla_megatron.algorithms import Algorithm
from nla_megatron.models.batching import next_token_targets
from nla_megatron.models.logprobs import token_entropy, token_logprobs
from nla_megatron.models.pipeline import Loss
from nla_megatron.types import Microbatch

STATISTICS = ("loss", "kl", "entropy", "clipped", "logprob_gap", "logprob_gap_max")


def policy_loss(algorithm: Algorithm, total_tokens: float, temperature: float) -> Loss:
    """The loss over batches with the fields `mask`, `advantages`, `sampler`, and where wanted `reference` and `old`.

    Without `old` the batch is updated on once, straight after it was sampled: the old policy is the present one.
    `logprob_gap*` compare the trainer's log-probs with the sampler's, token by token: the health of the loop.
    """

    def loss(logits_BTV: Tensor, part: Microbatch) -> tuple[Tensor, Mapping[str, Tensor]]:
        fields = part.fields
        mask_BT = fields["mask"] * part.weights[:, None]
        entropy_BT = token_entropy(logits_BTV, temperature)
        logprobs_BT = token_logprobs(logits_BTV, next_token_targets(part.ids), temperature)
        old_BT = fields.get("old", logprobs_BT.detach())
        losses_BT, per_token = algorithm.token_loss(logprobs_BT, old_BT, fields.get("reference"), fields["advantages"])
        value = (losses_BT * mask_BT).sum() / total_tokens
        gap_BT = ((old_BT - fields["sampler"]).abs() * mask_BT).detach()
        means = {"entropy": entropy_BT, "logprob_gap": gap_BT, "kl": mask_BT * 0, "clipped": mask_BT * 0, **per_token}
        statistics = {name: (values * mask_BT).sum() / total_tokens for name, values in means.items()}
        return value, {"loss": value.detach(), "logprob_gap_max": gap_BT.max(), **statistics}

    return loss
