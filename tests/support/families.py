"""A tiny random model of every family, made and saved by transformers.

Norm weights and biases are random too (as they start, zero-centring and missing biases would not show); windows are
shorter than the texts, heads wider or narrower than the hidden size's share, groups several.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nla_megatron.conversion.families import family_of
from nla_megatron.types import ModelShape

COMMON: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
_EXPERTS = {"num_experts_per_tok": 2}

# name: (architecture, what differs from COMMON)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2ForCausalLM", {
        "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "rope_parameters": _YARN,
    }),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 10, "attention_bias": True}),
    "llama": ("LlamaForCausalLM", {"rope_parameters": _LLAMA3, "tie_word_embeddings": True}),
    "llama-biased": ("LlamaForCausalLM", {
        "attention_bias": True, "mlp_bias": True,
        "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1000.0},
    }),
    "mistral": ("MistralForCausalLM", {"sliding_window": 6, "head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", {
        "head_dim": 10, "query_pre_attn_scalar": 7, "sliding_window": 5, "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    }),
    "gemma3": ("Gemma3ForCausalLM", {
        "head_dim": 12, "query_pre_attn_scalar": 9, "sliding_window": 5, "final_logit_softcapping": 4.0,
        "layer_types": [f"{kind}_attention" for kind in ("sliding", "sliding", "full", "sliding", "full")],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    }),
    "qwen3-moe": ("Qwen3MoeForCausalLM", {
        "head_dim": 10, "num_experts": 4, "moe_intermediate_size": 24, "norm_topk_prob": True, **_EXPERTS,
    }),
    "qwen3-moe-plain": ("Qwen3MoeForCausalLM", {
        "head_dim": 10, "num_experts": 4, "moe_intermediate_size": 24, "norm_topk_prob": False, **_EXPERTS,
    }),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "sliding_window": 6, **_EXPERTS}),
}  # fmt: skip
MIXTURES = tuple(name for name, (_, options) in MODELS.items() if "num_experts_per_tok" in options)


def family_shape(name: str) -> ModelShape:
    """The model's shape, from transformers' configuration alone."""
    import transformers

    architecture, options = MODELS[name]
    kind = getattr(transformers, architecture).config_class
    config = kind(**{**COMMON, "tie_word_embeddings": False, **options}, architectures=[architecture]).to_dict()
    return family_of(config).shape_from_config(config)


def family_model(name: str, directory: Path, **sizes: int) -> Any:
    """Make the model (with `sizes` of its own), save it in `directory`, and return it in fp32 with plain attention."""
    import torch
    import transformers

    architecture, options = MODELS[name]
    kind = getattr(transformers, architecture)
    config = kind.config_class(**{**COMMON, "tie_word_embeddings": False, **options, **sizes})
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(len(name))
        model = kind(config).float().eval()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                parameter.normal_(mean=float("norm" in parameter_name), std=0.2)
    model.save_pretrained(directory)
    return model
