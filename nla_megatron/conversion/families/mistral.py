"""Mistral: Llama's blocks, with `sliding_window` a window in all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nla_megatron.conversion.families.configuration import base_config, base_shape, checked, window_size
from nla_megatron.conversion.families.llama_like import decoder_rules as rules
from nla_megatron.types import ModelShape

__all__ = ["ARCHITECTURE", "config_from_shape", "rules", "shape_from_config"]

ARCHITECTURE = "MistralForCausalLM"
_DEFAULTS = {"rope_theta": 10_000.0, "sliding_window": 4096}
FIXED = {"hidden_act": ("silu",)}


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """The shape, after refusing by name every feature that the Megatron side would not honour."""
    config = checked(config, _DEFAULTS, ("sliding_window",), FIXED)
    return replace(base_shape(config, ARCHITECTURE), windows=everywhere(config))


def everywhere(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """One window for all blocks, or none."""
    window = config.get("sliding_window")
    return (window,) * config["num_hidden_layers"] if window else ()


def config_from_shape(shape: ModelShape) -> dict[str, Any]:
    """A config.json that transformers reads back to the same shape."""
    return {**base_config(shape, "mistral"), "sliding_window": window_size(shape)}
