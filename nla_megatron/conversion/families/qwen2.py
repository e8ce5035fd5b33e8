"""Qwen2 and Qwen2.5: biases on query, key and value; with `use_sliding_window` the upper blocks have a window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nla_megatron.conversion.families.configuration import (
    base_config,
    base_shape,
    checked,
    layer_types,
    read_windows,
    window_size,
)
from nla_megatron.conversion.families.llama_like import decoder_rules as rules
from nla_megatron.types import ModelShape

__all__ = ["ARCHITECTURE", "config_from_shape", "rules", "shape_from_config"]

ARCHITECTURE = "Qwen2ForCausalLM"
READ = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
DEFAULTS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
FIXED = {"hidden_act": ("silu",)}


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """The shape, after refusing by name every feature that the Megatron side would not honour."""
    config = checked(config, DEFAULTS, READ, FIXED)
    return replace(base_shape(config, ARCHITECTURE), qkv_bias=True, windows=windows_of(config))


def windows_of(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    window = config["sliding_window"] if config["use_sliding_window"] else None
    full = config["max_window_layers"] if window else config["num_hidden_layers"]
    kinds = ["full_attention" if block < full else "sliding_attention" for block in range(config["num_hidden_layers"])]
    return read_windows(config, window, kinds)


def config_from_shape(shape: ModelShape) -> dict[str, Any]:
    """A config.json that transformers reads back to the same shape."""
    return {**base_config(shape, "qwen2"), **window_entries(shape)}


def window_entries(shape: ModelShape) -> dict[str, Any]:
    if not shape.windows:
        return {"use_sliding_window": False}
    return {
        "use_sliding_window": True,
        "sliding_window": window_size(shape),
        "layer_types": layer_types(shape),
        "max_window_layers": shape.num_layers,
    }
