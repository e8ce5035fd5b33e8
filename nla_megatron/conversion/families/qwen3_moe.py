"""Qwen3-MoE: Qwen3's attention before a mixture of experts in every block, renormalised or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nla_megatron.conversion.families import mistral
from nla_megatron.conversion.families.configuration import (
    base_config,
    base_shape,
    checked,
    refuse,
    required,
    window_size,
)
from nla_megatron.conversion.families.llama_like import decoder_rules as rules
from nla_megatron.types import Experts, ModelShape

__all__ = ["ARCHITECTURE", "config_from_shape", "rules", "shape_from_config"]

ARCHITECTURE = "Qwen3MoeForCausalLM"
_DEFAULTS = {"sliding_window": 4096}
_READ = ("attention_bias", "use_sliding_window", "sliding_window", "max_window_layers", "num_experts",
         "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")  # fmt: skip
_FIXED = {"hidden_act": ("silu",), "decoder_sparse_step": (1,), "mlp_only_layers": ([], None)}


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """The shape, after refusing by name every feature that the Megatron side would not honour."""
    config = checked(config, _DEFAULTS, _READ, _FIXED)
    biased, renormalized = bool(config.get("attention_bias")), bool(config.get("norm_topk_prob"))
    # transformers 5 writes Mixtral's name for the count; older files have Qwen's own.
    count = config.get("num_local_experts") or required(config, "num_experts")
    experts = Experts(count, required(config, "num_experts_per_tok"), required(config, "moe_intermediate_size"),
                      renormalized)  # fmt: skip
    if experts.top_k == 1 and renormalized:
        refuse("num_experts_per_tok=1 with norm_topk_prob=True",
               "several: megatron-core gives the router of a single one no gradient")  # fmt: skip
    return replace(
        base_shape(config, ARCHITECTURE),
        qk_norm=True,
        qkv_bias=biased,
        output_bias=biased,
        windows=mistral.everywhere(config) if config.get("use_sliding_window") else (),
        experts=experts,
    )


def config_from_shape(shape: ModelShape) -> dict[str, Any]:
    """A config.json that transformers reads back to the same shape."""
    assert shape.experts is not None
    return {
        **base_config(shape, "qwen3_moe"),
        "attention_bias": shape.qkv_bias,
        "use_sliding_window": bool(shape.windows),
        "sliding_window": window_size(shape),
        "num_experts": shape.experts.count,
        "num_experts_per_tok": shape.experts.top_k,
        "moe_intermediate_size": shape.experts.ffn_hidden_size,
        "norm_topk_prob": shape.experts.renormalized,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
