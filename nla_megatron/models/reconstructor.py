"""The AR: the first K+1 blocks without final norm, and an fp32 identity-initialised linear head at the last token.

Its backbone alone is what `extract` runs: its output is the residual stream after block K.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from nla_megatron.models.decoder import Decoder, build_chunks, is_last_chunk
from nla_megatron.parallel.world import World
from nla_megatron.types import Microbatch, ModelShape


class Backbone(Decoder):
    """Embedding and blocks; `shape` is already truncated to the K+1 blocks that are wanted."""

    def __init__(self, shape: ModelShape, world: World, dtype: str, vp_stage: int | None = None):
        super().__init__(shape, world, dtype, vp_stage, with_head=False)
        self.gathers = world.sequence_parallel and is_last_chunk(world, vp_stage)

    def forward(self, batch: Microbatch) -> Tensor:
        """The residual stream after this stage's last block, (T, B, D); after the model's last, of all tokens."""
        hidden_TBD = self.through_blocks(batch)
        if not self.gathers:
            return hidden_TBD
        # Every TP rank computes the same of it, so each one's gradient is whole.
        return gather_from_sequence_parallel_region(hidden_TBD, tensor_parallel_output_grad=False)


class Reconstructor(Backbone):
    """Text in, vectors out. The value head (D, D) sits on the last stage, alike on every TP rank, as the stream is."""

    def __init__(self, shape: ModelShape, world: World, dtype: str, vp_stage: int | None = None):
        super().__init__(shape, world, dtype, vp_stage)
        self.value_head: torch.nn.Linear | None = None
        if is_last_chunk(world, vp_stage):
            self.value_head = torch.nn.Linear(shape.hidden_size, shape.hidden_size, bias=False, dtype=torch.float32)
            with torch.no_grad():
                self.value_head.weight.copy_(torch.eye(shape.hidden_size))

    def forward(self, batch: Microbatch) -> Tensor:
        """Predicted activations (B, D) fp32 on the last stage; the residual stream (T, B, D) elsewhere."""
        hidden_TBD = super().forward(batch)
        if self.value_head is None:
            return hidden_TBD
        rows = torch.arange(batch.ids.shape[0], device=batch.ids.device)
        return self.value_head(hidden_TBD[batch.lengths - 1, rows].float())


def build_backbone(shape: ModelShape, world: World, dtype: str) -> Backbone:
    """The backbone of a stage that is one chunk; `build_chunks(Backbone, …)` builds any."""
    [model] = build_chunks(Backbone, shape, world, dtype)
    return model


def build_reconstructor(shape: ModelShape, world: World, dtype: str) -> Reconstructor:
    """The AR of a stage that is one chunk; `build_chunks(Reconstructor, …)` builds any."""
    [model] = build_chunks(Reconstructor, shape, world, dtype)
    return model
