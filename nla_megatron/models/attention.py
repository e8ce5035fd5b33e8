"""Core attention for Megatron's local layers by PyTorch's SDPA: fast on GPU and CPU for NLA's short sequences."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


class SdpaCoreAttention(MegatronModule):
    """Causal attention; rows are right-padded, so no real token ever sees a padding key and no mask is needed."""

    def __init__(self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str, **_: Any):
        super().__init__(config=config)
        self.scale = config.kv_channels**-0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> Tensor:
        """(T, B, heads, hd), (T, B, groups, hd) x 2 -> (T, B, heads * hd), of this TP rank's heads."""
        if packed_seq_params is not None:
            raise NotImplementedError("packed sequences need a variable-length attention kernel")
        length, rows, heads, width = query.shape
        q_BHTD, k_BGTD, v_BGTD = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        groups = k_BGTD.shape[1]
        if groups != heads:
            k_BGTD, v_BGTD = (tensor.repeat_interleave(heads // groups, dim=1) for tensor in (k_BGTD, v_BGTD))
        out = F.scaled_dot_product_attention(q_BHTD, k_BGTD, v_BGTD, is_causal=True, scale=self.scale)
        return out.permute(2, 0, 1, 3).reshape(length, rows, heads * width)
