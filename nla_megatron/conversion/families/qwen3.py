"""Qwen3 dense: norms on queries and keys; with `attention_bias` all of attention's projections have biases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nla_megatron.conversion.families import qwen2
from nla_megatron.conversion.families.configuration import base_config, base_shape, checked
from nla_megatron.conversion.families.llama_like import decoder_rules as rules
from nla_megatron.types import ModelShape

__all__ = ["ARCHITECTURE", "config_from_shape", "rules", "shape_from_config"]

ARCHITECTURE = "Qwen3ForCausalLM"


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """The shape, after refusing by name every feature that the Megatron side would not honour."""
    config = checked(config, {**qwen2.DEFAULTS, "head_dim": 128}, (*qwen2.READ, "attention_bias"), qwen2.FIXED)
    biased = bool(config.get("attention_bias"))
    return replace(
        base_shape(config, ARCHITECTURE),
        qk_norm=True,
        qkv_bias=biased,
        output_bias=biased,
        windows=qwen2.windows_of(config),
    )


def config_from_shape(shape: ModelShape) -> dict[str, Any]:
    """A config.json that transformers reads back to the same shape."""
    return {
        **base_config(shape, "qwen3"),
        **qwen2.window_entries(shape),
        "attention_bias": shape.qkv_bias,
    }
