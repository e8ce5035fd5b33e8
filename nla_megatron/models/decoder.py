"""What the AV and the AR share: a Megatron decoder of any shape, whole or one chunk of blocks of it."""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from nla_megatron.interventions.spec import EMBEDDING
from nla_megatron.models.builder import DTYPES, placed
from nla_megatron.models.interventions import Changes, Sites
from nla_megatron.models.layers import scale_output
from nla_megatron.models.quantized import NONE
from nla_megatron.models.spec import block_spec, decoder_config
from nla_megatron.parallel.cpu import megatron_device
from nla_megatron.parallel.world import World
from nla_megatron.types import Microbatch, ModelShape


class Decoder(GPTModel):
    """This rank's blocks, with the embedding on the first stage and, with a head, final norm and output on the last.

    Args:
        vp_stage: which of the stage's chunks this is; None where a stage is one chunk.
        with_head: without one no stage post-processes, so there is neither a final norm nor an output layer.
        quantize: how the blocks' linear layers hold their weights; see `models.quantized`.
    """

    shape: ModelShape
    sites: Sites | None = None
    """Set by `models.interventions.intervene`."""

    def __init__(
        self, shape: ModelShape, world: World, dtype: str, vp_stage: int | None, *,
        with_head: bool, quantize: str = NONE,
    ):  # fmt: skip
        config = decoder_config(shape, world, DTYPES[dtype], quantize)
        super().__init__(
            config,
            block_spec(shape, config, vp_stage),
            vocab_size=shape.padded_vocab_size,
            max_sequence_length=shape.max_positions,
            pre_process=world.is_first_stage and vp_stage in (None, 0),
            post_process=with_head and is_last_chunk(world, vp_stage),
            # Each block's attention turns queries and keys itself.
            position_embedding_type="none",
            share_embeddings_and_output_weights=shape.tied_embeddings and with_head,
            vp_stage=vp_stage,
        )
        self.shape = shape
        if self.pre_process and shape.embedding_scale != 1.0:
            scale_output(self.embedding, shape.embedding_scale)

    def through_blocks(self, batch: Microbatch) -> Tensor:
        """What GPTModel puts out: logits (B, T, V/tp) where the head is, the residual stream (T, B, D) elsewhere."""
        positions_BT = torch.arange(batch.ids.shape[1], device=batch.ids.device)[None].expand_as(batch.ids)
        changes = {} if self.sites is None else self.sites.changes(batch)
        embedded_TBD = self._embedded(batch.ids, positions_BT, changes) if self.pre_process else None
        # See `models.spec.IntervenedLayer`.
        options = {"attention_bias": changes} if changes else None
        return super().forward(
            batch.ids, positions_BT, attention_mask=None, decoder_input=embedded_TBD, extra_block_kwargs=options
        )

    def _embedded(self, ids_BT: Tensor, positions_BT: Tensor, changes: Changes) -> Tensor:
        stream_TBD = self.embedding(input_ids=ids_BT, position_ids=positions_BT)
        for change in changes.get(EMBEDDING, ()):
            stream_TBD = change(stream_TBD)
        if self.config.recompute_granularity is not None and torch.is_grad_enabled() and not stream_TBD.requires_grad:
            # A recomputed block learns only if its input has a gradient, which frozen embeddings do not give it.
            stream_TBD = stream_TBD.detach().requires_grad_()
        return stream_TBD


def is_last_chunk(world: World, vp_stage: int | None) -> bool:
    """The chunk that holds the model's last block."""
    return world.is_last_stage and vp_stage in (None, world.vpp - 1)


D = TypeVar("D", bound=Decoder, covariant=True)


class MakesChunk(Protocol[D]):
    """A decoder's class."""

    def __call__(self, shape: ModelShape, world: World, dtype: str, vp_stage: int | None = None) -> D: ...


def build_chunks(kind: MakesChunk[D], shape: ModelShape, world: World, dtype: str) -> list[D]:
    """This rank's chunks of a model, in order, on its device: one, or `world.vpp` of them.

    Example:
        >>> chunks = build_chunks(Verbalizer, shape, world, "bfloat16")
    """
    stages = list(range(world.vpp)) if world.vpp > 1 else [None]
    with megatron_device():
        chunks = [kind(shape, world, dtype, stage) for stage in stages]
    for chunk in chunks:
        placed(chunk, world, dtype)
    return chunks
