"""Reading and writing config.json: what all families share, and refusing by name what is not honoured.

transformers 5 keeps the rotary embedding in `rope_parameters`; before, it was `rope_theta` and `rope_scaling`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from nla_megatron.errors import UnsupportedModel
from nla_megatron.types import ModelShape, RopeScaling

_READ = frozenset({
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "rope_parameters", "rope_scaling", "rope_theta", "rms_norm_eps", "tie_word_embeddings",
    "max_position_embeddings",
})  # fmt: skip
_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}
"""What every family must leave so, if it says it at all."""
_WITHOUT_EFFECT = frozenset({
    # names, versions, token ids
    "architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "name_or_path", "tokenizer_class",
    "prefix", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id",
    "forced_bos_token_id", "forced_eos_token_id", "id2label", "label2id", "num_labels", "problem_type",
    "finetuning_task", "task_specific_params", "unsloth_version", "unsloth_fixed",
    # how others run, initialise or train it
    "initializer_range", "use_cache", "cache_implementation", "attn_implementation", "gradient_checkpointing",
    "torchscript", "use_bfloat16", "return_dict", "output_attentions", "output_hidden_states", "tf_legacy_loss",
    "chunk_size_feed_forward", "pretraining_tp", "output_router_logits", "router_aux_loss_coef", "is_decoder",
    # how it generates
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "num_return_sequences", "output_scores", "return_dict_in_generate",
    "remove_invalid_values", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens",
    "exponential_decay_length_penalty",
})  # fmt: skip
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings", "attention_factor", "truncate"),
}
_OFF: tuple[Any, ...] = (None, False, [], {}, "")


def refuse(found: str, expected: str) -> NoReturn:
    raise UnsupportedModel(f"{found} in config.json", expected, "this feature is not converted yet")


def checked(
    config: Mapping[str, Any], defaults: Mapping[str, Any], read: Collection[str], fixed: Mapping[str, tuple[Any, ...]]
) -> dict[str, Any]:
    """The configuration with a family's defaults filled in.

    Args:
        defaults: what transformers assumes where a key is absent.
        read: the keys that the family honours besides the common ones.
        fixed: keys that the Megatron side does not honour, and the values that ask for nothing.

    Raises:
        UnsupportedModel: a fixed key has another value, or a key that nobody knows is set.
    """
    for key, allowed in (_FIXED | dict(fixed)).items():
        if config.get(key, allowed[0]) not in allowed:
            refuse(f"{key}={config[key]!r}", f"{key} of {' or '.join(map(repr, allowed))}")
    known = _READ | _FIXED.keys() | _WITHOUT_EFFECT | set(read) | fixed.keys()
    for key, value in config.items():
        if key not in known and not key.startswith("_") and value not in _OFF:
            raise UnsupportedModel(
                f"{key}={value!r} in config.json", "keys whose meaning is known here",
                "remove the key if it changes nothing in what the model computes",
            )  # fmt: skip
    return {**defaults, **config}


def required(config: Mapping[str, Any], key: str) -> Any:
    if config.get(key) is None:
        raise UnsupportedModel(f"no {key} in config.json", f"a value for {key}", "complete config.json")
    return config[key]


def base_shape(config: Mapping[str, Any], architecture: str, rope: Mapping[str, Any] | None = None) -> ModelShape:
    """The fields that all families have, from a `checked` configuration; `rope` where it is not the usual one."""
    heads, hidden = required(config, "num_attention_heads"), required(config, "hidden_size")
    theta, scaling = read_rope(config, _rope_of(config) if rope is None else rope)
    return ModelShape(
        family=architecture,
        num_layers=required(config, "num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=required(config, "intermediate_size"),
        num_heads=heads,
        num_kv_heads=required(config, "num_key_value_heads"),
        head_dim=config.get("head_dim") or hidden // heads,
        vocab_size=required(config, "vocab_size"),
        rope_theta=theta,
        norm_eps=required(config, "rms_norm_eps"),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qk_norm=False,
        max_positions=required(config, "max_position_embeddings"),
        rope_scaling=scaling,
    )


def _rope_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    new, old = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    if new and old and any(new.get(key, value) != value for key, value in old.items()):
        refuse(f"rope_parameters={new!r} and rope_scaling={old!r}", "one of the two")
    return new or old


def read_rope(config: Mapping[str, Any], rope: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling of one kind of block. Raises UnsupportedModel for a type or a key that is not honoured."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in _ROPE_KEYS:
        refuse(f"rope_type={kind!r}", f"one of {', '.join(_ROPE_KEYS)}")
    known = {"rope_type", "type", "rope_theta", *_ROPE_KEYS[kind]}
    for key, value in rope.items():
        if key not in known and value not in _OFF and (key, value) != ("partial_rotary_factor", 1):
            refuse(f"{key}={value!r} of {kind} rope", f"{', '.join(sorted(known))} only")
    theta = float(required({"rope_theta": rope.get("rope_theta", config.get("rope_theta"))}, "rope_theta"))
    if kind == "default":
        return theta, None
    options: dict[str, Any] = {key: rope[key] for key in _ROPE_KEYS[kind] if rope.get(key) is not None}
    factor = float(required(options, "factor"))
    del options["factor"]
    if "original_max_position_embeddings" in _ROPE_KEYS[kind]:
        positions = options.pop("original_max_position_embeddings", None)
        options["original_max_positions"] = positions or required(config, "max_position_embeddings")
    return theta, RopeScaling(kind, factor, **options)


def write_rope(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """`rope_parameters` as transformers 5 has them."""
    if scaling is None:
        return {"rope_theta": theta, "rope_type": "default"}
    values: dict[str, Any] = {
        **vars(scaling), "original_max_position_embeddings": scaling.original_max_positions
    }  # fmt: skip
    options = {key: values[key] for key in _ROPE_KEYS[scaling.kind] if values[key] is not None}
    return {"rope_theta": theta, "rope_type": scaling.kind, **options}


def read_windows(config: Mapping[str, Any], window: int | None, default: list[str]) -> tuple[int | None, ...]:
    """Windows by block from `layer_types`, which is `default` where config.json has none; empty without any window."""
    kinds = config.get("layer_types") or default
    if len(kinds) != config["num_hidden_layers"]:
        refuse(f"{len(kinds)} layer_types", f"one for each of the {config['num_hidden_layers']} blocks")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            refuse(f"{kind!r} among layer_types", "full_attention or sliding_attention")
    if "sliding_attention" not in kinds:
        return ()
    if not window:
        refuse("sliding_attention among layer_types without a sliding_window", "a sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def layer_types(shape: ModelShape) -> list[str]:
    return [
        "full_attention" if shape.window_of(block) is None else "sliding_attention" for block in range(shape.num_layers)
    ]


def window_size(shape: ModelShape) -> int | None:
    """The one size that config.json can say."""
    sizes = set(shape.windows) - {None}
    assert len(sizes) <= 1, sizes
    return next(iter(sizes), None)


def base_config(shape: ModelShape, model_type: str, activation: str | None = "silu") -> dict[str, Any]:
    """The entries of config.json that all families have; transformers reads them back to the same shape."""
    config = {
        "architectures": [shape.family],
        "model_type": model_type,
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "rope_parameters": write_rope(shape.rope_theta, shape.rope_scaling),
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": shape.norm_eps,
        "tie_word_embeddings": shape.tied_embeddings,
        "max_position_embeddings": shape.max_positions,
        "attention_dropout": 0.0,
        "dtype": "float32",
    }
    return config if activation is None else {**config, "hidden_act": activation}
