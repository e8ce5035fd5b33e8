"""The AV: a language model that reads an activation at one position of its prompt. Also the plain language model."""

from __future__ import annotations

from functools import partial

import torch
from megatron.core import parallel_state
from torch import Tensor

from nla_megatron.models.decoder import Decoder, build_chunks
from nla_megatron.models.layers import soft_capped
from nla_megatron.models.quantized import NONE
from nla_megatron.parallel.world import World
from nla_megatron.types import Microbatch, ModelShape


class Verbalizer(Decoder):
    """A Megatron decoder with an output layer; `models.interventions.intervene` makes it read activations."""

    def __init__(self, shape: ModelShape, world: World, dtype: str, vp_stage: int | None = None, quantize: str = NONE):
        super().__init__(shape, world, dtype, vp_stage, with_head=True, quantize=quantize)

    def forward(self, batch: Microbatch) -> Tensor:
        """Logits of this TP rank's vocabulary rows, (B, T, V/tp), on the last stage; hidden states elsewhere."""
        out = self.through_blocks(batch)
        if not self.post_process:
            return out
        return self._without_padding_rows(soft_capped(out, self.shape.logit_softcap))

    def _without_padding_rows(self, logits_BTV: Tensor) -> Tensor:
        """Rows that only pad the vocabulary take no probability."""
        first = parallel_state.get_tensor_model_parallel_rank() * logits_BTV.shape[-1]
        real = self.shape.vocab_size - first
        if real >= logits_BTV.shape[-1]:
            return logits_BTV
        padding = torch.arange(logits_BTV.shape[-1], device=logits_BTV.device) >= real
        return logits_BTV.masked_fill(padding, torch.finfo(logits_BTV.dtype).min)


def build_verbalizer(shape: ModelShape, world: World, dtype: str, quantize: str = NONE) -> Verbalizer:
    """The AV of a stage that is one chunk; `build_chunks(Verbalizer, …)` builds any."""
    [model] = build_chunks(partial(Verbalizer, quantize=quantize), shape, world, dtype)
    return model
