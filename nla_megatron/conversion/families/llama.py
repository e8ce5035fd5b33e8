"""Llama 2 and 3: rope scaling (llama3, linear, yarn), tied embeddings of the small ones, optional biases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nla_megatron.conversion.families.configuration import base_config, base_shape, checked
from nla_megatron.conversion.families.llama_like import decoder_rules as rules
from nla_megatron.types import ModelShape

__all__ = ["ARCHITECTURE", "config_from_shape", "rules", "shape_from_config"]

ARCHITECTURE = "LlamaForCausalLM"
_READ = ("attention_bias", "mlp_bias")
_FIXED = {"hidden_act": ("silu",)}


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """The shape, after refusing by name every feature that the Megatron side would not honour."""
    # Llama's first configurations say neither the rotary base nor the key/value heads.
    defaults = {"rope_theta": 10_000.0, "num_key_value_heads": config.get("num_attention_heads")}
    config = checked(config, defaults, _READ, _FIXED)
    biased = bool(config.get("attention_bias"))
    return replace(
        base_shape(config, ARCHITECTURE),
        qkv_bias=biased,
        output_bias=biased,
        mlp_bias=bool(config.get("mlp_bias")),
    )


def config_from_shape(shape: ModelShape) -> dict[str, Any]:
    """A config.json that transformers reads back to the same shape."""
    return {**base_config(shape, "llama"), "attention_bias": shape.qkv_bias, "mlp_bias": shape.mlp_bias}
