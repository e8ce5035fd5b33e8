"""Attention for Megatron's local layers: rotary embeddings of each block's own, PyTorch's SDPA as core attention.

Fast on GPU and CPU for NLA's short sequences. Legend: T tokens, B rows, H heads, G key/value heads, W head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor

from nla_megatron.models.layers import soft_capped
from nla_megatron.models.rotary import RotaryTables, rotated


def visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """(T, T) bool: which key (column) each query sees: itself and what is before, at most `window` tokens in all."""
    at = torch.arange(length, device=device)
    back = at[:, None] - at[None]
    seen = back >= 0
    return seen if window is None else seen & (back < window)


class RotaryAttention(SelfAttention):
    """Self-attention that turns queries and keys by the tables of its own block."""

    def __init__(self, *sizes: Any, rotary: tuple[RotaryTables, RotaryTables], **options: Any):
        """`rotary`: the tables of blocks without and with a window."""
        super().__init__(*sizes, **options)
        windowed = self.config.shape.window_of(self.layer_number - 1) is not None
        self.rotary = rotary[windowed]

    def get_query_key_value_tensors(self, *streams: Any, **options: Any) -> Any:
        query, key, value = super().get_query_key_value_tensors(*streams, **options)
        cos, sin = self.rotary(query.shape[0], query)
        return rotated(query, cos, sin), rotated(key, cos, sin), value


class SdpaCoreAttention(MegatronModule):
    """Causal attention; rows are right-padded, so no real token ever sees a padding key and no mask is needed.

    Soft-capped scores and sinks are computed step by step: SDPA knows neither.
    """

    def __init__(self, config: Any, layer_number: int, pg_collection: Any = None, **_: Any):
        super().__init__(config=config)
        shape = config.shape
        self.scale = shape.head_dim**-0.5 if shape.query_scale is None else shape.query_scale
        self.window, self.softcap = shape.window_of(layer_number - 1), shape.attention_softcap
        self.tp_group = pg_collection.tp
        self.softmax_offset: torch.nn.Parameter | None = None
        if shape.sinks:
            heads = shape.num_heads // config.tensor_model_parallel_size
            self.softmax_offset = torch.nn.Parameter(torch.zeros(heads, dtype=config.params_dtype))
            set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> Tensor:
        """(T, B, H, W), (T, B, G, W) x 2 -> (T, B, H * W), of this TP rank's heads."""
        if packed_seq_params is not None:
            raise NotImplementedError("packed sequences need a variable-length attention kernel")
        length, rows, heads, width = query.shape
        q_BHTW, k_BGTW, v_BGTW = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        groups = k_BGTW.shape[1]
        if groups != heads:
            k_BGTW, v_BGTW = (tensor.repeat_interleave(heads // groups, dim=1) for tensor in (k_BGTW, v_BGTW))
        if self.softcap is not None or self.softmax_offset is not None:
            out = self._step_by_step(q_BHTW, k_BGTW, v_BGTW)
        elif self.window is None or self.window >= length:
            out = F.scaled_dot_product_attention(q_BHTW, k_BGTW, v_BGTW, is_causal=True, scale=self.scale)
        else:
            seen = visible(length, self.window, query.device)
            out = F.scaled_dot_product_attention(q_BHTW, k_BGTW, v_BGTW, attn_mask=seen, scale=self.scale)
        return out.permute(2, 0, 1, 3).reshape(length, rows, heads * width)

    def _step_by_step(self, q_BHTW: Tensor, k_BHTW: Tensor, v_BHTW: Tensor) -> Tensor:
        scores_BHTT = soft_capped(q_BHTW @ k_BHTW.transpose(-1, -2) * self.scale, self.softcap)
        seen = visible(q_BHTW.shape[2], self.window, q_BHTW.device)
        scores_BHTT = scores_BHTT.float().masked_fill(~seen, float("-inf"))
        if self.softmax_offset is not None:
            sinks = self.softmax_offset.float()[:, None, None].expand(*scores_BHTT.shape[:3], 1)
            scores_BHTT = torch.cat([scores_BHTT, sinks], dim=-1)
        weights = scores_BHTT.softmax(dim=-1)[..., : q_BHTW.shape[2]]
        return weights.to(v_BHTW.dtype) @ v_BHTW

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True), prefix, {"softmax_offset": 0}, sharded_offsets,
            tp_group=self.tp_group, dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )  # fmt: skip
