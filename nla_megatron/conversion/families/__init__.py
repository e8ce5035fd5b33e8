"""One file per model family; the registry knows them by the `architectures` entry of a Hugging Face config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from nla_megatron.conversion.families import qwen3
from nla_megatron.conversion.rules import Rule
from nla_megatron.errors import UnsupportedModel
from nla_megatron.types import ModelShape


class Family(Protocol):
    """What a family's module offers."""

    ARCHITECTURE: str

    def shape_from_config(self, config: Mapping[str, Any]) -> ModelShape: ...
    def config_from_shape(self, shape: ModelShape) -> dict[str, Any]: ...
    def rules(self, shape: ModelShape, with_head: bool) -> list[Rule]: ...


FAMILIES: dict[str, Family] = {qwen3.ARCHITECTURE: qwen3}


def family_of(config: Mapping[str, Any]) -> Family:
    """Raises UnsupportedModel by name for an architecture without a table."""
    names = config.get("architectures") or ["none"]
    if names[0] not in FAMILIES:
        raise UnsupportedModel(
            f"architecture {names[0]!r} in config.json",
            f"one of {', '.join(FAMILIES)}",
            "add a table to conversion/families",
        )
    return FAMILIES[names[0]]


def rules_of(shape: ModelShape, with_head: bool) -> list[Rule]:
    """The rules of a model; `with_head=False` leaves out the final norm and the output layer, as the AR does."""
    return FAMILIES[shape.family].rules(shape, with_head)
