"""The AV: a language model that reads an activation at one position of its prompt. Also the plain language model."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from nla_megatron.interventions.maths import intervene
from nla_megatron.models.builder import DTYPES, layer_spec, placed, transformer_config
from nla_megatron.parallel.cpu import megatron_device
from nla_megatron.parallel.world import World
from nla_megatron.types import Injection, Microbatch, ModelShape


class Verbalizer(GPTModel):
    """A Megatron decoder with an injection at the output of one block, on whichever stage owns it."""

    shape: ModelShape

    def __init__(self, shape: ModelShape, world: World, dtype: str):
        config = transformer_config(shape, world, DTYPES[dtype])
        super().__init__(
            config,
            layer_spec(shape),
            vocab_size=shape.padded_vocab_size,
            max_sequence_length=shape.max_positions,
            pre_process=world.is_first_stage,
            post_process=world.is_last_stage,
            position_embedding_type="rope",
            rotary_base=shape.rope_theta,
            share_embeddings_and_output_weights=shape.tied_embeddings,
        )
        self.shape = shape
        self._injection: Injection | None = None

    def inject_at(self, layer: int, method: str, scale: float) -> None:
        """From now on a microbatch's injection enters the output of block `layer` (0-based)."""

        def hook(module: Any, inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
            if self._injection is None:
                return output
            stream_TBD, context = output
            return _injected(stream_TBD, self._injection, method, scale), context

        for block in self.decoder.layers:
            if block.layer_number == layer + 1:
                block.register_forward_hook(hook)

    def forward(self, batch: Microbatch) -> Tensor:
        """Logits of this TP rank's vocabulary rows, (B, T, V/tp), on the last stage; hidden states elsewhere."""
        positions_BT = torch.arange(batch.ids.shape[1], device=batch.ids.device)[None].expand_as(batch.ids)
        self._injection = batch.injection
        out = super().forward(batch.ids, positions_BT, attention_mask=None)
        return self._without_padding_rows(out) if self.post_process else out

    def _without_padding_rows(self, logits_BTV: Tensor) -> Tensor:
        """Rows that only pad the vocabulary take no probability."""
        first = parallel_state.get_tensor_model_parallel_rank() * logits_BTV.shape[-1]
        real = self.shape.vocab_size - first
        if real >= logits_BTV.shape[-1]:
            return logits_BTV
        padding = torch.arange(logits_BTV.shape[-1], device=logits_BTV.device) >= real
        return logits_BTV.masked_fill(padding, torch.finfo(logits_BTV.dtype).min)


def _injected(stream_TBD: Tensor, injection: Injection, method: str, scale: float) -> Tensor:
    rows = torch.arange(stream_TBD.shape[1], device=stream_TBD.device)
    at = (injection.positions, rows)
    return stream_TBD.index_put(at, intervene(method, stream_TBD[at], injection.vectors, scale))


def build_verbalizer(shape: ModelShape, world: World, dtype: str) -> Verbalizer:
    with megatron_device():
        model = Verbalizer(shape, world, dtype)
    placed(model, world, dtype)
    return model
