"""What vLLM's own cuts keep of an adapter's pairs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nla_megatron.errors import ModelsDiffer
from nla_megatron.reshard.adapter import adapter_needs

A, B = (f"base_model.model.model.layers.0.mlp.down_proj.lora_{one}.weight" for one in "AB")
SHAPES = {A: (2, 8), B: (6, 2)}


def manager_of(**layer: Any) -> Any:
    """As vLLM's: the layers that it adapts, by name."""
    modules = {"model.layers.0.mlp.down_proj": SimpleNamespace(**layer)} if layer else {}
    return SimpleNamespace(modules=modules, packed_modules={}, model=SimpleNamespace())


def kept(manager: Any) -> dict[str, list[tuple[range, ...]]]:
    out: dict[str, list[tuple[range, ...]]] = {}
    for need in adapter_needs(manager, SHAPES, "float32"):
        out.setdefault(need.piece.region.name, []).append(need.piece.region.axes)
    return out


def test_a_cut_that_is_a_view_keeps_its_part_and_any_other_the_whole() -> None:
    def columns(a: Tensor) -> Tensor:
        return a[:, 4:]

    def reordered(b: Tensor) -> Tensor:
        return torch.cat([b[4:], b[:1]])

    found = kept(manager_of(tp_size=2, n_slices=1, slice_lora_a=columns, slice_lora_b=reordered))
    assert found == {A: [(range(2), range(4, 8))], B: [(range(6), range(2))]}


def test_one_rank_keeps_everything() -> None:
    assert kept(manager_of(tp_size=1, n_slices=1)) == {A: [(range(2), range(8))], B: [(range(6), range(2))]}


def test_an_adapter_of_a_layer_that_vllm_does_not_adapt_is_named() -> None:
    with pytest.raises(ModelsDiffer, match="model.layers.0.mlp.down_proj"):
        adapter_needs(manager_of(), SHAPES, "float32")
