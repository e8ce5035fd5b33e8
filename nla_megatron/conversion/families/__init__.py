"""One file per model family; the registry knows them by the `architectures` entry of a Hugging Face config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from nla_megatron.conversion.families import gemma2, gemma3, llama, mistral, mixtral, qwen2, qwen3, qwen3_moe
from nla_megatron.conversion.rules import Rule
from nla_megatron.errors import UnsupportedModel
from nla_megatron.types import ModelShape


class Family(Protocol):
    """What a family's module offers."""

    ARCHITECTURE: str

    def shape_from_config(self, config: Mapping[str, Any]) -> ModelShape: ...
    def config_from_shape(self, shape: ModelShape) -> dict[str, Any]: ...
    def rules(self, shape: ModelShape, with_head: bool) -> list[Rule]: ...


_MODULES: tuple[Family, ...] = (qwen2, qwen3, qwen3_moe, llama, mistral, mixtral, gemma2, gemma3)
FAMILIES: dict[str, Family] = {family.ARCHITECTURE: family for family in _MODULES}

_NOT_CONVERTED = {
    "Gemma3ForConditionalGeneration": (
        "a text model: images are not converted",
        "save its language model as Gemma3ForCausalLM with transformers",
    ),
    "GptOssForCausalLM": (
        "a family whose experts are tensors of their own: gpt-oss stacks a block's experts in one tensor, transposed,"
        " gate and up interleaved, in MXFP4 as published, and a rule here is made of whole tensors",
        "convert another family",
    ),
}
"""(what is expected, what to do) for architectures that look as if they were known."""


def family_of(config: Mapping[str, Any]) -> Family:
    """Raises UnsupportedModel by name for an architecture without a table."""
    names = config.get("architectures") or ["none"]
    name = names[0] if isinstance(names, list) else names
    if not isinstance(names, list) or not isinstance(name, str) or name not in FAMILIES:
        known = f"one of {', '.join(FAMILIES)}", "add a table to conversion/families"
        expected, remedy = _NOT_CONVERTED.get(str(name), known)
        raise UnsupportedModel(f"architecture {name!r} in config.json", expected, remedy)
    return FAMILIES[name]


def rules_of(shape: ModelShape, with_head: bool) -> list[Rule]:
    """The rules of a model; `with_head=False` leaves out the final norm and the output layer, as the AR does."""
    return FAMILIES[shape.family].rules(shape, with_head)


def is_tied(config: Mapping[str, Any]) -> bool | None:
    """Whether output layer and embedding are one tensor: as config.json says, or its family where it does not. None of
    a family that is not known.
    """
    if "tie_word_embeddings" in config:
        return bool(config["tie_word_embeddings"])
    family = FAMILIES.get(str(next(iter(config.get("architectures") or ()), "")))
    return None if family is None else family.shape_from_config(config).tied_embeddings
