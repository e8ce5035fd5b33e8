"""A critic: all blocks of the policy, and in place of its output layer a scalar per token, the value of what follows.

It reads the policy's own sequences with the policy's interventions (`models.interventions.intervene`). The value at a
position is that of the text up to and including its token, so where a policy's mask says that a response token is
predicted, the value is the expectation before that token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nla_megatron.models.decoder import build_chunks, is_last_chunk
from nla_megatron.models.reconstructor import Backbone
from nla_megatron.parallel.world import World
from nla_megatron.types import Microbatch, ModelShape


class Critic(Backbone):
    """Values of tokens. The head (1, D) with its bias is fp32, on the last stage, alike on every TP rank.

    The head reads the residual stream scaled to root mean square 1: the policy's final norm without its weights, which
    the head's own would only repeat. It starts at zero, so that the first step's advantages are those of no baseline.
    """

    def __init__(self, shape: ModelShape, world: World, dtype: str, vp_stage: int | None = None):
        super().__init__(shape, world, dtype, vp_stage)
        self.value_head: torch.nn.Linear | None = None
        if is_last_chunk(world, vp_stage):
            self.value_head = torch.nn.Linear(shape.hidden_size, 1, dtype=torch.float32)
            torch.nn.init.zeros_(self.value_head.weight)
            torch.nn.init.zeros_(self.value_head.bias)

    def forward(self, batch: Microbatch) -> Tensor:
        """Values (B, T) fp32 on the last stage; the residual stream (T, B, D) elsewhere."""
        hidden_TBD = super().forward(batch)
        if self.value_head is None:
            return hidden_TBD
        scaled_TBD = F.rms_norm(hidden_TBD.float(), (self.shape.hidden_size,), eps=self.shape.norm_eps)
        return self.value_head(scaled_TBD).squeeze(-1).transpose(0, 1).contiguous()


def build_critic(shape: ModelShape, world: World, dtype: str) -> Critic:
    """The critic of a stage that is one chunk; `build_chunks(Critic, …)` builds any."""
    [model] = build_chunks(Critic, shape, world, dtype)
    return model


def response_values(values_BT: Tensor, part: Microbatch) -> Tensor:
    """A `models.pipeline.Collect`: values where the field `mask` has response tokens, (B, T), 0 elsewhere."""
    return values_BT * part.fields["mask"]
