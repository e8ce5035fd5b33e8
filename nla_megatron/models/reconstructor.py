"""The AR: the first blocks of a language model without final norm, and an fp32 head that makes one vector of a text.

Its backbone alone is what `extract` runs: its output is the residual stream after the last block that is kept.
"""

from __future__ import annotations

from functools import partial

from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from nla_megatron.contract.blocks import ReconstructorSpec
from nla_megatron.models.decoder import Decoder, build_chunks, is_last_chunk
from nla_megatron.models.heads import ReconstructionHead
from nla_megatron.models.quantized import NONE
from nla_megatron.parallel.world import World
from nla_megatron.types import Microbatch, ModelShape

PLAIN = ReconstructorSpec()


class Backbone(Decoder):
    """Embedding and blocks; `shape` is already truncated to the blocks that are wanted."""

    def __init__(
        self, shape: ModelShape, world: World, dtype: str, vp_stage: int | None = None, *, quantize: str = NONE
    ):
        super().__init__(shape, world, dtype, vp_stage, with_head=False, quantize=quantize)
        self.gathers = world.sequence_parallel and is_last_chunk(world, vp_stage)

    def forward(self, batch: Microbatch) -> Tensor:
        """The residual stream after this stage's last block, (T, B, D); after the model's last, of all tokens."""
        hidden_TBD = self.through_blocks(batch)
        if not self.gathers:
            return hidden_TBD
        # Every TP rank computes the same of it, so each one's gradient is whole.
        return gather_from_sequence_parallel_region(hidden_TBD, tensor_parallel_output_grad=False)


class Reconstructor(Backbone):
    """Text in, vectors out. The head sits on the last stage, alike on every TP rank, as the stream is."""

    def __init__(
        self,
        shape: ModelShape,
        world: World,
        dtype: str,
        vp_stage: int | None = None,
        *,
        spec: ReconstructorSpec = PLAIN,
        seed: int = 0,
        quantize: str = NONE,
    ):
        super().__init__(shape, world, dtype, vp_stage, quantize=quantize)
        self.spec = spec
        self.value_head: ReconstructionHead | None = None
        if is_last_chunk(world, vp_stage):
            self.value_head = ReconstructionHead(shape, spec, seed)

    def forward(self, batch: Microbatch) -> Tensor:
        """Predicted activations (B, D) fp32 on the last stage; the residual stream (T, B, D) elsewhere."""
        hidden_TBD = super().forward(batch)
        return hidden_TBD if self.value_head is None else self.value_head(hidden_TBD, batch)


def build_backbone(shape: ModelShape, world: World, dtype: str) -> Backbone:
    """The backbone of a stage that is one chunk; `build_chunks(Backbone, …)` builds any."""
    [model] = build_chunks(Backbone, shape, world, dtype)
    return model


def build_reconstructor(
    shape: ModelShape, world: World, dtype: str, spec: ReconstructorSpec = PLAIN, seed: int = 0, quantize: str = NONE
) -> Reconstructor:
    """The AR of a stage that is one chunk; `build_chunks(Reconstructor, …)` builds any.

    Args:
        spec: how it reads; its depth is that of `shape`.
        seed: of its dropout.
        quantize: how the blocks' linear layers hold their weights.
    """
    [model] = build_chunks(partial(Reconstructor, spec=spec, seed=seed, quantize=quantize), shape, world, dtype)
    return model
