"""Qwen3 dense: grouped-query attention with q/k norms and no biases, SwiGLU, RMSNorm, rotary embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nla_megatron.conversion.rules import Part, Rule
from nla_megatron.errors import UnsupportedModel
from nla_megatron.types import ModelShape

ARCHITECTURE = "Qwen3ForCausalLM"


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """The shape, after refusing by name every feature that the Megatron side would not honour."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    refused = {
        "attention_bias": config.get("attention_bias", False),
        "use_sliding_window": config.get("use_sliding_window", False),
        "rope_type": None if rope.get("rope_type", rope.get("type", "default")) == "default" else rope,
        "hidden_act": None if config.get("hidden_act", "silu") == "silu" else config["hidden_act"],
    }
    for key, value in refused.items():
        if value:
            raise UnsupportedModel(
                f"{key}={value!r} in config.json", "a Qwen3 without it", "this feature is not converted yet"
            )
    # transformers 5 keeps the rope base in rope_parameters; before, it was a key of its own.
    rope_theta = rope.get("rope_theta", config.get("rope_theta"))
    if rope_theta is None:
        raise UnsupportedModel(
            "no rope_theta in config.json", "rope_parameters.rope_theta or rope_theta", "complete config.json"
        )
    return ModelShape(
        family=ARCHITECTURE,
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        vocab_size=config["vocab_size"],
        rope_theta=float(rope_theta),
        norm_eps=config["rms_norm_eps"],
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qk_norm=True,
        max_positions=config["max_position_embeddings"],
    )


def config_from_shape(shape: ModelShape) -> dict[str, Any]:
    """A config.json that transformers reads back to the same shape."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "qwen3",
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "rope_parameters": {"rope_theta": shape.rope_theta, "rope_type": "default"},
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": shape.norm_eps,
        "tie_word_embeddings": shape.tied_embeddings,
        "max_position_embeddings": shape.max_positions,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "dtype": "float32",
    }


def rules(shape: ModelShape, with_head: bool) -> list[Rule]:
    """Embedding, blocks in order, then the final norm and output layer where there is a head."""
    embedding = (shape.padded_vocab_size, shape.hidden_size)
    embed = Part("model.embed_tokens.weight")
    table = [Rule("embedding.word_embeddings.weight", embedding, (embed,), tp_axis=0, rows=shape.vocab_size)]
    for block in range(shape.num_layers):
        table += _block(shape, block)
    if with_head:
        table.append(Rule("decoder.final_layernorm.weight", (shape.hidden_size,), (Part("model.norm.weight"),)))
        head = embed if shape.tied_embeddings else Part("lm_head.weight")
        table.append(
            Rule(
                "output_layer.weight", embedding, (head,), tp_axis=0, rows=shape.vocab_size, alias=shape.tied_embeddings
            )
        )
    return table


def _block(shape: ModelShape, block: int) -> list[Rule]:
    ours, theirs = f"decoder.layers.{block}.", f"model.layers.{block}."
    d, ffn, hd = shape.hidden_size, shape.ffn_hidden_size, shape.head_dim
    groups, per_group = shape.num_kv_heads, shape.num_heads // shape.num_kv_heads
    q, k, v = (
        Part(f"{theirs}self_attn.{name}_proj.weight", slots) for name, slots in (("q", per_group), ("k", 1), ("v", 1))
    )
    o = Part(f"{theirs}self_attn.o_proj.weight")
    gate, up, down = (Part(f"{theirs}mlp.{name}_proj.weight") for name in ("gate", "up", "down"))
    attention = f"{ours}self_attention."
    norms = {
        "input_layernorm.weight": ("input_layernorm.weight", d),
        "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight", d),
        "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight", hd),
        "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight", hd),
    }
    return [
        *(Rule(ours + name, (width,), (Part(theirs + hf),)) for name, (hf, width) in norms.items()),
        Rule(f"{attention}linear_qkv.weight", (groups, per_group + 2, hd, d), (q, k, v), tp_axis=0, slot_axis=1),
        Rule(f"{attention}linear_proj.weight", (d, shape.num_heads * hd), (o,), tp_axis=1),
        Rule(f"{ours}mlp.linear_fc1.weight", (2, ffn, d), (gate, up), tp_axis=1, slot_axis=0),
        Rule(f"{ours}mlp.linear_fc2.weight", (d, ffn), (down,), tp_axis=1),
    ]
