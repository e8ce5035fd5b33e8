"""The traced plan against vLLM loading the same tensors itself: every parameter of every family, bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from nla_megatron.conversion.families import FAMILIES
from nla_megatron.errors import ModelsDiffer
from nla_megatron.reshard import vllm_side
from nla_megatron.reshard.megatron_side import tensors_of
from nla_megatron.reshard.vllm_side import ORDINARY, Trace, trace
from nla_megatron.types import ModelShape
from tests.support.families import MIXTURES, MODELS, family_shape

# vLLM's attention on a CPU refuses heads narrower than 32, which the tracing does not.
CASES = [(name, tp, False) for name in MODELS for tp in (1, 2, 4)] + [(name, 2, True) for name in MIXTURES]


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tests.support.reshard import vllm_config_of

    known: dict[str, Any] = {}

    def config_of(name: str) -> Any:
        if name not in known:
            shape, directory = shape_of(name), tmp_path_factory.mktemp(name)
            (directory / "config.json").write_text(json.dumps(FAMILIES[shape.family].config_from_shape(shape)))
            known[name] = vllm_config_of(directory)
        return known[name]

    return config_of


def shape_of(name: str) -> ModelShape:
    """vLLM knows Gemma with tied embeddings only, as Google publishes it; its CPU experts want a width of 32 n."""
    shape = family_shape(name)
    shape = replace(shape, hidden_size=64) if name in MIXTURES else shape
    return replace(shape, tied_embeddings=True) if name.startswith("gemma") else shape


def random_tensors(shape: ModelShape) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {name: torch.rand(size, generator=generator) for name, size in tensors_of(shape).items()}


def filled_by(found: Trace, full: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters that the needs of a trace give."""
    out = {name: torch.zeros(one.shape, dtype=getattr(torch, one.dtype)) for name, one in found.parameters.items()}
    for need in found.needs:
        if not need.piece.buffer.startswith(ORDINARY):
            picked = full[need.piece.region.name]
            for axis, one in enumerate(need.piece.region.axes):
                picked = picked.index_select(axis, torch.tensor(list(one)))
            target = out[need.piece.buffer]
            target.as_strided(picked.shape, need.piece.strides, need.piece.offset).copy_(picked)
    return out


@pytest.mark.parametrize(("name", "tp", "expert_parallel"), CASES)
def test_traced_copies_fill_what_vllm_loads(name: str, tp: int, expert_parallel: bool, configs: Any) -> None:
    shape, config = shape_of(name), configs(name)
    full = random_tensors(shape)
    for rank in range(tp):
        found = trace(config, tensors_of(shape), rank, tp, expert_parallel)
        assert found.ordinary == ()
        with vllm_side._as_rank(rank, tp, expert_parallel, config):
            model = vllm_side.skeleton(config, torch.device("cpu"))
            for parameter in model.parameters():
                parameter.data.zero_()
            model.load_weights(iter(full.items()))
        ours = filled_by(found, full)
        theirs = dict(model.named_parameters())
        assert set(ours) == set(theirs)
        assert [one for one in theirs if not torch.equal(ours[one], theirs[one])] == []


def test_a_loader_that_is_no_copy_sends_its_module_the_ordinary_way(
    configs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, build = family_shape("qwen3"), vllm_side.skeleton
    tensors = tensors_of(shape)

    def with_transforms(config: Any, device: torch.device) -> Any:
        model = build(config, device)
        model.model.norm.weight.weight_loader = lambda parameter, loaded: parameter.data.copy_(loaded + 1)
        down = model.model.layers[1].mlp.down_proj.weight
        load = down.weight_loader
        object.__setattr__(
            down, "_weight_loader", lambda parameter, loaded: (load(parameter, loaded), parameter.data.mul_(2))
        )
        return model

    monkeypatch.setattr(vllm_side, "skeleton", with_transforms)
    found = trace(configs("qwen3"), tensors, 0, 2, False)
    assert found.ordinary == ("model.layers.1.mlp.down_proj.weight", "model.norm.weight")
    whole_ones = {need.piece.buffer: need.piece.region.shape for need in found.needs if ":" in need.piece.buffer}
    assert whole_ones == {ORDINARY + name: tensors[name] for name in found.ordinary}
    assert "model.norm.weight" not in found.parameters


def test_a_tensor_that_vllm_has_no_place_for_is_named(configs: Any) -> None:
    tensors = tensors_of(family_shape("qwen3"))
    with pytest.raises(ModelsDiffer, match="model.norm.weight"):
        trace(configs("qwen3"), {**tensors, "model.norm.weight": (49,)}, 0, 1, False)


def test_tracing_leaves_nothing_behind_that_an_engine_would_find(configs: Any) -> None:
    from vllm.distributed import parallel_state
    from vllm.model_executor.layers import rotary_embedding

    config, tensors = configs("qwen3"), tensors_of(shape_of("qwen3"))
    rotary_embedding._ROPE_DICT.clear()
    trace(config, tensors, 1, 2, False)
    assert rotary_embedding._ROPE_DICT == {} and parallel_state._TP is None
    assert config.compilation_config.static_forward_context == {}
    assert config.parallel_config.tensor_parallel_size == 1
