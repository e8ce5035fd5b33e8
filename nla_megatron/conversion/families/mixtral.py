"""Mixtral: Mistral's attention before a mixture of experts; the chosen experts' probabilities sum to one."""

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
from nla_megatron.conversion.families.llama_like import Names, decoder_rules
from nla_megatron.conversion.rules import Rule
from nla_megatron.types import Experts, ModelShape

ARCHITECTURE = "MixtralForCausalLM"
_DEFAULTS = {"rope_theta": 1e6, "num_experts_per_tok": 2, "num_local_experts": 8}
_READ = ("sliding_window", "num_local_experts", "num_experts_per_tok")
_FIXED = {**mistral.FIXED, "router_jitter_noise": (0, None)}
_NAMES = Names(
    router="block_sparse_moe.gate", expert="block_sparse_moe.experts.{}", gate="w1", up="w3", down="w2"
)  # fmt: skip


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """The shape, after refusing by name every feature that the Megatron side would not honour."""
    config = checked(config, _DEFAULTS, _READ, _FIXED)
    base = base_shape(config, ARCHITECTURE)
    experts = Experts(required(config, "num_local_experts"), required(config, "num_experts_per_tok"),
                      base.ffn_hidden_size)  # fmt: skip
    if experts.top_k == 1:
        refuse("num_experts_per_tok=1", "several: megatron-core gives the router of a single one no gradient")
    return replace(base, windows=mistral.everywhere(config), experts=experts)


def config_from_shape(shape: ModelShape) -> dict[str, Any]:
    """A config.json that transformers reads back to the same shape."""
    assert shape.experts is not None
    return {
        **base_config(shape, "mixtral"),
        "sliding_window": window_size(shape),
        "num_local_experts": shape.experts.count,
        "num_experts_per_tok": shape.experts.top_k,
    }


def rules(shape: ModelShape, with_head: bool) -> list[Rule]:
    return decoder_rules(shape, with_head, _NAMES)
