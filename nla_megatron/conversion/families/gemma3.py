"""Gemma 3's text model: Gemma 2's blocks with norms on queries and keys, and a rotary base of their own where windowed.

transformers reads `attn_logit_softcapping` for Gemma 3 and does nothing with it, so a value there is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nla_megatron.conversion.families import gemma2
from nla_megatron.conversion.families.configuration import (
    base_shape,
    checked,
    one_rope,
    read_rope,
    refuse,
    required,
    write_rope,
)
from nla_megatron.conversion.families.gemma2 import rules
from nla_megatron.types import ModelShape

__all__ = ["ARCHITECTURE", "config_from_shape", "rules", "shape_from_config"]

ARCHITECTURE = "Gemma3ForCausalLM"
_DEFAULTS = {**gemma2.DEFAULTS, "rope_theta": 1e6, "rope_local_base_freq": 10_000.0, "sliding_window_pattern": 6}
_READ = (*gemma2.READ, "rope_local_base_freq", "sliding_window_pattern")
_FIXED = {**gemma2.FIXED, "attn_logit_softcapping": (None,)}


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """The shape, after refusing by name every feature that the Megatron side would not honour."""
    config = checked(config, _DEFAULTS, _READ, _FIXED)
    every = config["sliding_window_pattern"]
    blocks = range(required(config, "num_hidden_layers"))
    kinds = ["sliding_attention" if (block + 1) % every else "full_attention" for block in blocks]
    rope, local = _ropes(config)
    local_theta, local_scaling = read_rope(config, local)
    if local_scaling is not None:
        refuse(f"{local_scaling.kind} rope of sliding_attention", "none")
    return replace(
        gemma2.gemma_shape(config, base_shape(config, ARCHITECTURE, rope), kinds),
        qk_norm=True,
        local_rope_theta=local_theta,
    )


def _ropes(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rotary parameters of the blocks without and with a window, from the new key or the old ones."""
    new = config.get("rope_parameters") or {}
    if new and not new.keys() <= {"full_attention", "sliding_attention"}:
        refuse(f"rope_parameters={new!r}", "full_attention and sliding_attention in it")
    for kind, value in new.items():
        if not isinstance(value, dict | None):
            refuse(f"{kind}={value!r} in rope_parameters", "an object")
    rope = dict(one_rope(new.get("full_attention") or {}, config.get("rope_scaling") or {}))
    local = dict(new.get("sliding_attention") or {})
    return rope, {"rope_theta": config["rope_local_base_freq"], **local}


def config_from_shape(shape: ModelShape) -> dict[str, Any]:
    """A config.json that transformers reads back to the same shape."""
    assert shape.local_rope_theta is not None
    return {
        **gemma2.gemma_config(shape, "gemma3_text"),
        "rope_parameters": {
            "full_attention": write_rope(shape.rope_theta, shape.rope_scaling),
            "sliding_attention": write_rope(shape.local_rope_theta, None),
        },
        "rope_local_base_freq": shape.local_rope_theta,
    }
