"""Reading and writing config.json: what all families share, and refusing by name what is not honoured.

transformers 5 keeps the rotary embedding in `rope_parameters`; before, it was `rope_theta` and `rope_scaling`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from nla_megatron.conversion.formats.config_keys import OFF, check_known, without_empty
from nla_megatron.errors import UnsupportedModel
from nla_megatron.types import ModelShape, RopeScaling

_READ = frozenset({
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "rope_parameters", "rope_scaling", "rope_theta", "rms_norm_eps", "tie_word_embeddings",
    "max_position_embeddings",
})  # fmt: skip
_DEFAULTS = {"rope_theta": 10_000.0}
_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}
"""What every family must leave so, if it says it at all."""
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings", "attention_factor", "truncate"),
}
_COUNTS = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "num_experts", "num_local_experts", "num_experts_per_tok",
    "moe_intermediate_size", "sliding_window", "max_window_layers",
)  # fmt: skip
_NUMBERS = ("rms_norm_eps", "rope_theta", "rope_local_base_freq", "query_pre_attn_scalar", "attn_logit_softcapping",
            "final_logit_softcapping")  # fmt: skip
_SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "norm_topk_prob")


def refuse(found: str, expected: str) -> NoReturn:
    raise UnsupportedModel(f"{found} in config.json", expected, "this feature is not converted yet")


def checked(
    config: Mapping[str, Any], defaults: Mapping[str, Any], read: Collection[str], fixed: Mapping[str, tuple[Any, ...]]
) -> dict[str, Any]:
    """The configuration with a family's defaults filled in, where a key is absent or null.

    Args:
        defaults: what transformers assumes where a key is absent.
        read: the keys that the family honours besides the common ones.
        fixed: keys that the Megatron side does not honour, and the values that ask for nothing.

    Raises:
        UnsupportedModel: a fixed key has another value, a value is of another kind than its key's, or a key that nobody
            knows is set.
    """
    said = without_empty(config)
    for key, allowed in (_FIXED | dict(fixed)).items():
        if said.get(key, allowed[0]) not in allowed:
            refuse(f"{key}={said[key]!r}", f"{key} of {' or '.join(map(repr, allowed))}")
    check_known(said, _READ | _FIXED.keys() | set(read) | fixed.keys())
    _check_kinds(said)
    return {**_DEFAULTS, **defaults, **said}


def _check_kinds(said: Mapping[str, Any]) -> None:
    """Raises UnsupportedModel for values that are not even of the kind that their keys have."""
    for key in (key for key in said if said[key] is not None):
        value, number = said[key], isinstance(said[key], int | float) and not isinstance(said[key], bool)
        if key in _COUNTS and not (number and isinstance(value, int) and value >= (key != "max_window_layers")):
            refuse(f"{key}={value!r}", "a whole number above 0")
        if key in _NUMBERS and not (number and 0 < value < float("inf")):
            refuse(f"{key}={value!r}", "a number above 0")
        if key in _SWITCHES and not isinstance(value, bool):
            refuse(f"{key}={value!r}", "true or false")
        if key in ("rope_parameters", "rope_scaling") and not isinstance(value, dict):
            refuse(f"{key}={value!r}", "an object")
        if key == "layer_types" and not isinstance(value, list):
            refuse(f"{key}={value!r}", "a list, of one entry for each block")


def required(config: Mapping[str, Any], key: str) -> Any:
    if config.get(key) is None:
        raise UnsupportedModel(f"no {key} in config.json", f"a value for {key}", "complete config.json")
    return config[key]


def base_shape(config: Mapping[str, Any], architecture: str, rope: Mapping[str, Any] | None = None) -> ModelShape:
    """The fields that all families have, from a `checked` configuration; `rope` where it is not the usual one."""
    heads, hidden = required(config, "num_attention_heads"), required(config, "hidden_size")
    theta, scaling = read_rope(config, _rope_of(config) if rope is None else rope)
    groups = required(config, "num_key_value_heads")
    if heads % groups:
        refuse(f"num_attention_heads={heads} with num_key_value_heads={groups}", "a multiple of the key/value heads")
    return ModelShape(
        family=architecture,
        num_layers=required(config, "num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=required(config, "intermediate_size"),
        num_heads=heads,
        num_kv_heads=groups,
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
    return one_rope(config.get("rope_parameters") or {}, config.get("rope_scaling") or {})


def one_rope(new: Mapping[str, Any], old: Mapping[str, Any]) -> Mapping[str, Any]:
    """Rotary parameters under transformers' new key and under its old one, where both must say the same."""
    renamed = {"rope_type" if key == "type" else key: value for key, value in old.items() if value is not None}
    # Which of two that differ is meant depends on the version of transformers.
    if new and any(new.get(key) != value for key, value in renamed.items()):
        refuse(f"rope_parameters={new!r} and rope_scaling={old!r}", "one of the two")
    return new or old


def read_rope(config: Mapping[str, Any], rope: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling of one kind of block. Raises UnsupportedModel for a type or a key that is not honoured."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("type") not in (None, kind):
        refuse(f"rope_type={kind!r} and type={rope['type']!r}", "one of the two")
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        refuse(f"rope_type={kind!r}", f"one of {', '.join(_ROPE_KEYS)}")
    known = {"rope_type", "type", "rope_theta", *_ROPE_KEYS[kind]}
    for key, value in rope.items():
        if key not in known and value not in OFF and (key, value) != ("partial_rotary_factor", 1):
            refuse(f"{key}={value!r} of {kind} rope", f"{', '.join(sorted(known))} only")
    for key in ("rope_theta", *_ROPE_KEYS[kind]):
        if rope.get(key) is not None and not isinstance(rope[key], int | float):
            refuse(f"{key}={rope[key]!r} of {kind} rope", "a number")
    theta = float(required(config if rope.get("rope_theta") is None else rope, "rope_theta"))
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
