"""Megatron models whose every parameter is cut from given Hugging Face tensors, for resharding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nla_megatron.conversion.families import rules_of
from nla_megatron.conversion.live import global_parameters, place_of
from nla_megatron.conversion.peft import fused_layers
from nla_megatron.conversion.rules import by_name
from nla_megatron.models.decoder import build_chunks
from nla_megatron.models.lora import LORA, add_lora
from nla_megatron.models.lora import adapted as adapted_layers
from nla_megatron.models.lora_spec import LoraSpec
from nla_megatron.models.verbalizer import Verbalizer
from nla_megatron.parallel.collectives import gather_objects
from nla_megatron.parallel.world import World
from nla_megatron.reshard.megatron_side import tensors_of
from nla_megatron.types import ModelShape
from tests.support.families import family_shape


def shape_of(name: str) -> ModelShape:
    """What vLLM knows of a family: Gemma with tied embeddings only, Qwen3 without a bias behind its attention.

    Its experts on a CPU want a width of 32 n.
    """
    shape = family_shape(name)
    shape = replace(shape, hidden_size=64) if shape.experts is not None else shape
    shape = replace(shape, output_bias=False) if name == "qwen3" else shape
    return replace(shape, tied_embeddings=True) if name.startswith("gemma") else shape


def tensors(shape: ModelShape) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(size, generator=generator) for name, size in tensors_of(shape).items()}


@torch.no_grad()
def trainer(shape: ModelShape, full: dict[str, Tensor], world: World, dtype: str = "float32") -> Any:
    """A model whose every parameter is cut from `full` by the conversion rules."""
    model, rules = build_chunks(Verbalizer, shape, world, dtype), by_name(rules_of(shape, True))
    for name, parameter in global_parameters(model).items():
        rule = rules[name]
        parameter.copy_(rule.read(lambda one, axis, a, b: full[one].narrow(axis, a, b - a), *place_of(rule, world)))
    return model


@torch.no_grad()
def adapted(model: Any, shape: ModelShape, full: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """Adapt the model; returns the tensors that it then stands for, merged by PyTorch in one place."""
    add_lora(model, fused_layers(shape, world.tp), LoraSpec(2, 4.0, targets=("q_proj", "v_proj")))
    for name, parameter in global_parameters(model).items():
        if f".{LORA}." in name and name.endswith(".B"):
            parameter.fill_(0.25)
    low = torch.full((1, 2), 0.25)
    out = dict(full)
    for rank in gather_objects(_own_A(model), world):
        for name, A in rank.items():
            delta = (low.expand(len(full[name]), 2) @ A) * 2.0
            out[name] = full[name] + delta
    return out


def _own_A(model: Any) -> dict[str, Tensor]:
    """A of every adapted projection of this rank by HF name, where it is whole."""
    return {
        f"{slot.hf}.weight": pair.A.detach()
        for linear in adapted_layers(model).values()
        for slot in linear.lora.layer.slots
        for name, pair in linear.lora.pairs.items()
        if name == slot.projection and not linear.lora.layer.inputs_cut
    }
