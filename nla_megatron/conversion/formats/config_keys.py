"""Which keys of config.json can change what a model computes.

A family's table names the keys that it honours and the values that it leaves fixed. Of all others, those that cannot
matter are known by rule, not by list, so that a new version of transformers adds none that would stop a user. What is
left is refused by name, and a user who knows better admits it by name (`allow_unknown_config`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from typing import Any

from nla_megatron.errors import UnsupportedModel

OFF: tuple[Any, ...] = (None, False, [], {}, "")
"""Values that ask for nothing."""
_WITHOUT_EFFECT = frozenset({
    # names and labels
    "architectures", "model_type", "dtype", "torch_dtype", "prefix", "id2label", "label2id", "num_labels",
    "problem_type", "task_specific_params",
    # how others run, initialise or train it
    "initializer_range", "use_cache", "cache_implementation", "attn_implementation", "gradient_checkpointing",
    "torchscript", "use_bfloat16", "return_dict", "output_attentions", "output_hidden_states", "tf_legacy_loss",
    "chunk_size_feed_forward", "pretraining_tp", "output_router_logits", "router_aux_loss_coef", "is_decoder",
    # how older versions of transformers have it generate
    "decoder_start_token_id", "num_beam_groups", "diversity_penalty", "early_stopping", "typical_p", "bad_words_ids",
    "exponential_decay_length_penalty", "encoder_no_repeat_ngram_size", "begin_suppress_tokens", "suppress_tokens",
    "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "output_scores", "length_penalty",
})  # fmt: skip
_BY_NAME = re.compile(
    # which tokens begin, end, pad or stand for something
    r".*token_ids?|.*_token_index"
    # where it came from
    r"|(.*_)?(version|commit|revision|hash|sha|licen[cs]e|authors?|url|timestamp|citation|description|tags|languages?)"
    r"|(.*_)?name_or_path|(base_)?model_name|name|run_name|transformers\..*"
    r"|(created|trained|converted|merged|(fine)?tuned|quanti[sz]ed|distilled)_(at|by|from|on|with)|dequanti[sz]ed.*"
    r"|(unsloth|tokenizer|mergekit|axolotl|trl|hub|finetuning|datasets?)_.*"
)
QUANTIZATION = re.compile(r"quant(i[sz](ed?|er|ation))?(_.*)?|compression_config|.*_quantization(_.*)?")
"""What says that weights are quantised, or were. Weights in floating point say which."""
_HEADS_BY_DEFAULT = (
    "LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
)  # fmt: skip
"""Where a null of num_key_value_heads is as many as there are heads; an absent one is a number of the family's."""
NULL_IS_OFF = frozenset({"sliding_window", "attn_logit_softcapping", "final_logit_softcapping"})
"""Keys that are on where they are absent: a null switches them off. Elsewhere null is as good as absent."""

_admitted: frozenset[str] = frozenset()


@contextmanager
def admitting(keys: Collection[str]) -> Iterator[None]:
    """Inside, unknown keys of these names are passed over by every reader of the process, its threads included."""
    global _admitted
    before, _admitted = _admitted, _admitted | frozenset(keys)
    try:
        yield
    finally:
        _admitted = before


def without_empty(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that say something: nulls go, but for those that switch something off or name no token."""
    said = {
        key: value
        for key, value in config.items()
        if value is not None or key in NULL_IS_OFF or key.endswith("token_id")
    }
    names = config.get("architectures")
    if "num_key_value_heads" in config.keys() - said.keys() and isinstance(names, list):
        if names[:1] and names[0] in _HEADS_BY_DEFAULT and "num_attention_heads" in said:
            said["num_key_value_heads"] = said["num_attention_heads"]
    return said


def check_known(config: Mapping[str, Any], known: Collection[str]) -> None:
    """Raises UnsupportedModel for a key that may change what the model computes and that nobody here knows.

    Args:
        known: the keys that the family honours or has checked.
    """
    for key, value in config.items():
        if key in known or value in OFF or _BY_NAME.fullmatch(key):
            continue
        if QUANTIZATION.fullmatch(key):
            raise UnsupportedModel(
                f"{key}={value!r} in config.json", "weights in floating point, without quantisation",
                "take the original of the checkpoint, from which it was quantised",
            )  # fmt: skip
        if key not in _admitted and not _changes_nothing(key, value, str(config.get("model_type"))):
            raise UnsupportedModel(
                f"{key}={value!r} in config.json", "keys whose meaning is known here",
                f"if it changes nothing in what the model computes, add allow_unknown_config=[{key}] "
                "or remove the key",
            )  # fmt: skip


def _changes_nothing(key: str, value: Any, model_type: str) -> bool:
    if key.startswith("_") or key in _WITHOUT_EFFECT:
        return True
    # Asked last: transformers takes a second to import.
    return key in _generation_options() or value == defaults_of(model_type).get(key, _UNSAID)


_UNSAID = object()


@cache
def _generation_options() -> frozenset[str]:
    from transformers import GenerationConfig

    return frozenset(vars(GenerationConfig()))


@cache
def defaults_of(model_type: str) -> Mapping[str, Any]:
    """What transformers takes where a key is absent; a key with that value says nothing new."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return vars(CONFIG_MAPPING[model_type]()) if model_type in CONFIG_MAPPING else {}


def takes_null(model_type: str, key: str) -> bool:
    """Whether transformers reads a null of this key as it reads none: it is what the key has where it is absent."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        return False
    kind: Any = CONFIG_MAPPING[model_type]
    named = {field.name: field.default for field in fields(kind)}
    return named.get(key) is None
