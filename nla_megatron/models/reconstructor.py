"""The AR: the first K+1 blocks without final norm, and an fp32 identity-initialised linear head at the last token.

Its backbone alone is what `extract` runs: its output is the residual stream after block K.
"""

from __future__ import annotations

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from nla_megatron.models.builder import DTYPES, layer_spec, placed, transformer_config
from nla_megatron.parallel.cpu import megatron_device
from nla_megatron.parallel.world import World
from nla_megatron.types import Microbatch, ModelShape


class Backbone(GPTModel):
    """Embedding and blocks; `shape` is already truncated to the K+1 blocks that are wanted.

    GPTModel is told that no stage post-processes, so there is neither a final norm nor an output layer.
    """

    shape: ModelShape

    def __init__(self, shape: ModelShape, world: World, dtype: str):
        super().__init__(
            transformer_config(shape, world, DTYPES[dtype]),
            layer_spec(shape),
            vocab_size=shape.padded_vocab_size,
            max_sequence_length=shape.max_positions,
            pre_process=world.is_first_stage,
            post_process=False,
            position_embedding_type="rope",
            rotary_base=shape.rope_theta,
            share_embeddings_and_output_weights=False,
        )
        self.shape = shape

    def forward(self, batch: Microbatch) -> Tensor:
        """The residual stream after this stage's last block, (T, B, D)."""
        positions_BT = torch.arange(batch.ids.shape[1], device=batch.ids.device)[None].expand_as(batch.ids)
        return super().forward(batch.ids, positions_BT, attention_mask=None)


class Reconstructor(Backbone):
    """Text in, vectors out. The value head (D, D) sits on the last stage, alike on every TP rank, as the stream is."""

    def __init__(self, shape: ModelShape, world: World, dtype: str):
        super().__init__(shape, world, dtype)
        self.value_head: torch.nn.Linear | None = None
        if world.is_last_stage:
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
    with megatron_device():
        model = Backbone(shape, world, dtype)
    placed(model, world, dtype)
    return model


def build_reconstructor(shape: ModelShape, world: World, dtype: str) -> Reconstructor:
    with megatron_device():
        model = Reconstructor(shape, world, dtype)
    placed(model, world, dtype)
    if model.value_head is not None:
        model.value_head.float()
    return model
