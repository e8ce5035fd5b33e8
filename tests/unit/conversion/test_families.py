"""Configurations of every family in both directions, against transformers, and what each family refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nla_megatron.conversion.families import FAMILIES, family_of, rules_of
from nla_megatron.errors import UnsupportedModel
from nla_megatron.types import Experts, ModelShape, RopeScaling
from tests.support.families import COMMON, MIXTURES, MODELS


def their_config(name: str, **changes: Any) -> Any:
    """transformers' configuration of a tiny model, with changes."""
    import transformers

    architecture, options = MODELS[name]
    kind = getattr(transformers, architecture).config_class
    return kind(**{**COMMON, "tie_word_embeddings": False, **options, **changes}, architectures=[architecture])


def shape_of(config: dict[str, Any]) -> ModelShape:
    return family_of(config).shape_from_config(config)


def written(config: Any, directory: Path) -> dict[str, Any]:
    """What `save_pretrained` writes."""
    config.save_pretrained(directory)
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("name", MODELS)
def test_shape_to_config_and_back_is_the_identity(name: str, tmp_path: Path) -> None:
    shape = shape_of(written(their_config(name), tmp_path))
    family = FAMILIES[shape.family]
    assert family.shape_from_config(json.loads(json.dumps(family.config_from_shape(shape)))) == shape


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_the_config_we_write_as_its_own(name: str, tmp_path: Path) -> None:
    config = their_config(name)
    shape = shape_of(written(config, tmp_path / "theirs"))
    again = type(config)(**FAMILIES[shape.family].config_from_shape(shape))
    assert shape_of(written(again, tmp_path / "again")) == shape
    compared = set(config.to_dict()) - {"architectures", "pad_token_id", "bos_token_id", "eos_token_id", "dtype"}
    # Said otherwise: windows that no block has, which blocks have one (Qwen), defaults of yarn, a derived head width.
    compared -= {"sliding_window", "max_window_layers", "rope_parameters", "head_dim", "_name_or_path"}
    different = {key: (getattr(config, key, None), getattr(again, key, None)) for key in compared}
    assert {key: pair for key, pair in different.items() if pair[0] != pair[1]} == {}


@pytest.mark.parametrize("name", sorted(set(MODELS) - set(MIXTURES)))
def test_names_and_shapes_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    import torch
    import transformers

    config = their_config(name)
    with torch.device("meta"):
        model = getattr(transformers, MODELS[name][0])(config)
    theirs = {one: tuple(parameter.shape) for one, parameter in model.named_parameters()}
    rules = rules_of(shape_of(written(config, tmp_path)), with_head=True)
    assert {part.hf: rule.hf_shape(part) for rule in rules for part in rule.parts} == theirs


@pytest.mark.parametrize("name", MODELS)
def test_an_absent_key_means_what_it_means_to_transformers(name: str, tmp_path: Path) -> None:
    """Key by key: without it we read the shape that transformers' own reading of the rest has, or refuse."""
    config = their_config(name)
    full = {key: value for key, value in written(config, tmp_path / "full").items() if key not in ("dtype",)}
    compared = 0
    for key in set(full) - {"architectures", "model_type", "transformers_version"}:
        rest = {one: value for one, value in full.items() if one != key}
        try:
            ours = shape_of(rest)
        except UnsupportedModel as refusal:
            asked = {"rope_parameters": "rope_theta", "num_local_experts": "num_experts"}.get(key, key)
            assert f"no {asked}" in refusal.found or key == "use_sliding_window" and "layer_types" in refusal.found
            continue
        assert ours == shape_of(written(type(config)(**rest), tmp_path / key)), key
        compared += 1
    assert compared > 5


def test_refused_architectures_are_named_with_the_known_ones() -> None:
    for architectures in (["GPT2LMHeadModel"], [], None):
        with pytest.raises(UnsupportedModel) as caught:
            family_of({"architectures": architectures})
        assert repr(architectures[0] if architectures else "none") in caught.value.found
        assert "Qwen3ForCausalLM" in caught.value.expected and "Gemma3ForCausalLM" in caught.value.expected


def test_the_multimodal_gemma_3_is_refused_with_the_way_to_its_text_model() -> None:
    with pytest.raises(UnsupportedModel, match="Gemma3ForConditionalGeneration") as caught:
        family_of({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {"num_hidden_layers": 34}})
    assert "Gemma3ForCausalLM" in caught.value.remedy


def test_gpt_oss_is_refused_with_the_reason() -> None:
    with pytest.raises(UnsupportedModel, match="GptOssForCausalLM") as caught:
        family_of({"architectures": ["GptOssForCausalLM"]})
    assert "MXFP4" in caught.value.expected


ROPE = {"rope_type": "default", "rope_theta": 1e4}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    *((name, {"attention_dropout": 0.1}, "attention_dropout=0.1") for name in MODELS),
    *((name, {"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config=") for name in MODELS),
    *((name, {"auto_map": {"AutoModel": "modeling_x.X"}}, "auto_map=") for name in MODELS),
    *((name, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5") for name in MODELS),
    *((name, {"an_unheard_of_feature": 3}, "an_unheard_of_feature=3") for name in MODELS),
    *((name, {"hidden_size": None}, "no hidden_size") for name in MODELS),
    *((name, {"hidden_act": "relu"}, "hidden_act='relu'") for name in MODELS),
    ("llama", {"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    ("llama", {"rope_parameters": {**ROPE, "rope_type": "longrope"}}, "'longrope'"),
    ("llama", {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    ("llama", {"rope_parameters": {**ROPE, "rope_type": "linear"}}, "no factor"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling="),
    ("llama", {"rope_parameters": ROPE, "rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
    ("llama", {"rope_parameters": ROPE, "rope_scaling": {"type": "dynamic"}}, "'dynamic'"),
    ("llama", {"rope_parameters": {**ROPE, "type": "linear", "factor": 2.0}}, "type='linear'"),
    ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}, "rope_scaling="),
    ("qwen2-window", {"rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 2.0, "mscale": 0.7}}, "mscale=0.7"),
    ("qwen2", {"hidden_size": "48"}, "hidden_size='48'"),
    ("qwen2", {"num_hidden_layers": 0}, "num_hidden_layers=0"),
    ("llama", {"num_attention_heads": 6}, "num_attention_heads=6 with num_key_value_heads=4"),
    ("llama", {"rope_scaling": "linear"}, "rope_scaling='linear'"),
    ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
    ("llama", {"rope_parameters": {"rope_type": ["x"], "rope_theta": 1e4}}, "rope_type=['x']"),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": "big"}}, "rope_theta='big'"),
    ("gemma3", {"rope_parameters": {"full_attention": "linear"}}, "full_attention='linear'"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 5}, "without a sliding_window"),
    ("qwen3", {"layer_types": ["full_attention"] * 4}, "4 layer_types"),
    ("qwen3", {"layer_types": ["full_attention"] * 4 + ["linear_attention"]}, "'linear_attention'"),
    ("mistral", {"layer_types": ["sliding_attention"] * 5}, "layer_types="),
    ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation='gelu'"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    ("gemma2", {"sliding_window": None}, "without a sliding_window"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    ("gemma3", {"rope_parameters": ROPE}, "rope_parameters="),
    ("gemma3", {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}}, "linear rope of"),
    ("qwen3-moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
    ("qwen3-moe", {"mlp_only_layers": [1]}, "mlp_only_layers=[1]"),
    ("qwen3-moe", {"num_experts_per_tok": 1}, "num_experts_per_tok=1"),
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
    ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok=1"),
]


@pytest.mark.parametrize(("name", "changes", "named"), REFUSED)
def test_a_value_that_is_not_honoured_is_refused_by_name(
    name: str, changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    config = written(their_config(name), tmp_path)
    shape_of(config)
    with pytest.raises(UnsupportedModel) as caught:
        shape_of({**config, **changes})
    assert named in caught.value.found and "config.json" in caught.value.found


def test_keys_without_effect_are_not_refused(tmp_path: Path) -> None:
    config = written(their_config("llama"), tmp_path)
    harmless = {"temperature": 0.6, "pretraining_tp": 1, "_name_or_path": "x", "use_cache": True, "new_flag": False}
    assert shape_of({**config, **harmless}) == shape_of(config)


PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Llama 2 7B, without a rotary base": (
        {
            "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
            "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008, "model_type": "llama",
            "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "pretraining_tp": 1,
            "num_key_value_heads": 32, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
            "torch_dtype": "float16", "transformers_version": "4.31.0.dev0", "use_cache": True, "vocab_size": 32000,
        },
        {"rope_theta": 10_000.0, "rope_scaling": None, "head_dim": 128},
    ),
    "Llama 3.2 1B, tied": (
        {
            "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "head_dim": 64,
            "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072,
            "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": True,
            "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                             "original_max_position_embeddings": 8192, "rope_type": "llama3"},
            "torch_dtype": "bfloat16", "vocab_size": 128256,
        },
        {"rope_theta": 5e5, "rope_scaling": RopeScaling("llama3", 32.0, 8192, 1.0, 4.0), "tied_embeddings": True},
    ),
    "Qwen2.5 7B": (
        {
            "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 3584,
            "intermediate_size": 18944, "max_position_embeddings": 131072, "max_window_layers": 28,
            "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False,
            "use_mrope": False, "use_sliding_window": False, "vocab_size": 152064,
        },
        {"qkv_bias": True, "output_bias": False, "windows": (), "head_dim": 128},
    ),
    "Gemma 3 1B": (
        {
            "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "attn_logit_softcapping": None, "cache_implementation": "hybrid", "final_logit_softcapping": None,
            "eos_token_id": [1, 106], "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
            "intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text",
            "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
            "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144,
        },
        {
            "rope_theta": 1e6, "local_rope_theta": 1e4, "tied_embeddings": True, "query_scale": None, "qk_norm": True,
            "windows": tuple(None if block % 6 == 5 else 512 for block in range(26)), "embedding_scale": 1152**0.5,
        },
    ),
    "Gemma 2 27B": (
        {
            "architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
            "head_dim": 128, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 4608, "intermediate_size": 36864, "max_position_embeddings": 8192, "model_type": "gemma2",
            "num_attention_heads": 32, "num_hidden_layers": 46, "num_key_value_heads": 16,
            "query_pre_attn_scalar": 144, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
            "vocab_size": 256000,
        },
        {
            "query_scale": 144**-0.5, "attention_softcap": 50.0, "logit_softcap": 30.0, "tied_embeddings": True,
            "windows": (4096, None) * 23, "zero_centered_norms": True,
        },
    ),
    "Qwen3 30B-A3B": (
        {
            "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "decoder_sparse_step": 1,
            "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144,
            "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
            "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
            "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
            "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.001, "sliding_window": None, "use_sliding_window": False, "vocab_size": 151936,
        },
        {"experts": Experts(128, 8, 768, True), "qk_norm": True, "windows": ()},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_of_older_versions_are_read(name: str) -> None:
    config, expected = PUBLISHED[name]
    shape = shape_of(config)
    assert {key: getattr(shape, key) for key in expected} == expected
