"""Gemma 2: zero-centred norms before and behind, windows in every other block, soft-capped scores and logits."""

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
    required,
    window_size,
)
from nla_megatron.conversion.families.llama_like import Names, decoder_rules
from nla_megatron.conversion.rules import Rule
from nla_megatron.types import ModelShape

ARCHITECTURE = "Gemma2ForCausalLM"
ACTIVATION = "gelu_pytorch_tanh"
DEFAULTS: dict[str, Any] = {
    "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096, "tie_word_embeddings": True,
}  # fmt: skip
_DEFAULTS = {**DEFAULTS, "rope_theta": 10_000.0, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
READ = ("attention_bias", "query_pre_attn_scalar", "sliding_window", "layer_types", "final_logit_softcapping")
FIXED = {
    "hidden_activation": (ACTIVATION,), "hidden_act": (ACTIVATION, None), "use_bidirectional_attention": (False, None),
}  # fmt: skip
_NAMES = Names(before_mlp="pre_feedforward_layernorm")


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """The shape, after refusing by name every feature that the Megatron side would not honour."""
    config = checked(config, _DEFAULTS, (*READ, "attn_logit_softcapping"), FIXED)
    blocks = range(required(config, "num_hidden_layers"))
    alternating = ["full_attention" if block % 2 else "sliding_attention" for block in blocks]
    return replace(
        gemma_shape(config, base_shape(config, ARCHITECTURE), alternating),
        attention_softcap=config["attn_logit_softcapping"],
    )


def gemma_shape(config: Mapping[str, Any], base: ModelShape, kinds: list[str]) -> ModelShape:
    """What the Gemmas share; `kinds` are the `layer_types` where config.json has none."""
    scalar, biased = required(config, "query_pre_attn_scalar"), bool(config.get("attention_bias"))
    return replace(
        base,
        activation="gelu_tanh",
        qkv_bias=biased,
        output_bias=biased,
        windows=read_windows(config, config["sliding_window"], kinds),
        query_scale=None if scalar == base.head_dim else float(scalar) ** -0.5,
        logit_softcap=config.get("final_logit_softcapping"),
        zero_centered_norms=True,
        sandwich_norms=True,
        embedding_scale=base.hidden_size**0.5,
    )


def config_from_shape(shape: ModelShape) -> dict[str, Any]:
    """A config.json that transformers reads back to the same shape."""
    return {**gemma_config(shape, "gemma2"), "attn_logit_softcapping": shape.attention_softcap}


def gemma_config(shape: ModelShape, model_type: str) -> dict[str, Any]:
    scalar = shape.head_dim if shape.query_scale is None else shape.query_scale**-2
    return {
        **base_config(shape, model_type, activation=None),
        "hidden_activation": ACTIVATION,
        "attention_bias": shape.qkv_bias,
        # transformers wants an integer, which a square root and back does not quite give.
        "query_pre_attn_scalar": round(scalar),
        "sliding_window": window_size(shape) or DEFAULTS["sliding_window"],
        "layer_types": layer_types(shape),
        "final_logit_softcapping": shape.logit_softcap,
    }


def rules(shape: ModelShape, with_head: bool) -> list[Rule]:
    return decoder_rules(shape, with_head, _NAMES)
