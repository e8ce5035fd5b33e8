"""The traced plan against vLLM loading the same tensors itself: every parameter of every family, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nla_megatron.conversion.families import FAMILIES
from nla_megatron.errors import ModelsDiffer
from nla_megatron.reshard import vllm_side
from nla_megatron.reshard.megatron_side import tensors_of
from nla_megatron.reshard.vllm_side import ORDINARY, Trace, check_taken, trace
from nla_megatron.types import ModelShape
from tests.support.families import MIXTURES, MODELS
from tests.support.reshard import loaded_by_vllm, vllm_config_of
from tests.support.reshard_models import shape_of, tensors

# vLLM's attention on a CPU refuses heads narrower than 32, which the tracing does not.
CASES = [(name, tp, False) for name in MODELS for tp in (1, 2, 4)] + [(name, 2, True) for name in MIXTURES]
NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ModelShape], Any]:
    known: dict[ModelShape, Any] = {}

    def config_of(shape: ModelShape) -> Any:
        if shape not in known:
            directory = tmp_path_factory.mktemp("config")
            (directory / "config.json").write_text(json.dumps(FAMILIES[shape.family].config_from_shape(shape)))
            known[shape] = vllm_config_of(directory)
        return known[shape]

    return config_of


def filled_by(found: Trace, full: dict[str, Tensor]) -> dict[str, Tensor]:
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


def checked_against_vllm(shape: ModelShape, config: Any, tp: int, expert_parallel: bool = False) -> list[Trace]:
    full = tensors(shape)
    traces = [trace(config, tensors_of(shape), rank, tp, expert_parallel) for rank in range(tp)]
    check_taken(traces, tensors_of(shape))
    for rank, found in enumerate(traces):
        assert found.ordinary == ()
        ours, theirs = filled_by(found, full), loaded_by_vllm(config, full, rank, tp, expert_parallel)
        assert set(ours) == set(theirs)
        assert [one for one in theirs if not torch.equal(ours[one], theirs[one])] == []
    return traces


@pytest.mark.parametrize(("name", "tp", "expert_parallel"), CASES)
def test_traced_copies_fill_what_vllm_loads(name: str, tp: int, expert_parallel: bool, configs: Any) -> None:
    shape = shape_of(name)
    checked_against_vllm(shape, configs(shape), tp, expert_parallel)


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])  # with tied embeddings, and without
def test_a_rank_whose_share_of_the_vocabulary_is_padding_needs_no_row_of_it(name: str, configs: Any) -> None:
    shape = replace(shape_of(name), vocab_size=65)  # 128 rows in vLLM, 32 on each rank
    traces = checked_against_vllm(shape, configs(shape), 4)
    rows = [
        sum(len(need.piece.region.axes[0]) for need in one.needs if "embed_tokens" in need.piece.region.name)
        for one in traces
    ]
    assert rows == [32, 32, 1, 0]


Load = Callable[[Tensor, Tensor], Any]


def traced_with(
    norm: Load, down: Callable[[Load], Load] | None, configs: Any, monkeypatch: pytest.MonkeyPatch
) -> tuple[Trace, dict[str, tuple[int, ...]]]:
    """The trace of a model two of whose loaders are others; `down` is given the one that it stands in front of."""
    shape, build = shape_of("qwen3"), vllm_side.skeleton

    def with_loaders(config: Any, device: torch.device) -> Any:
        model = build(config, device)
        model.model.norm.weight.weight_loader = norm
        if down is not None:
            weight = model.model.layers[1].mlp.down_proj.weight
            object.__setattr__(weight, "_weight_loader", down(weight.weight_loader))
        return model

    monkeypatch.setattr(vllm_side, "skeleton", with_loaders)
    return trace(configs(shape), tensors_of(shape), 0, 2, False), tensors_of(shape)


def test_a_loader_that_is_no_copy_sends_its_module_the_ordinary_way(
    configs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def added(parameter: Tensor, loaded: Tensor) -> None:
        parameter.data.copy_(loaded + 1)

    def doubled(load: Load) -> Load:
        return lambda parameter, loaded: (load(parameter, loaded), parameter.data.mul_(2))

    found, shapes = traced_with(added, doubled, configs, monkeypatch)
    assert found.ordinary == (DOWN, NORM)
    wholes = {need.piece.buffer: need.piece.region.shape for need in found.needs if ":" in need.piece.buffer}
    assert wholes == {ORDINARY + name: shapes[name] for name in found.ordinary}
    assert NORM not in found.parameters


def writes_the_source_first(parameter: Tensor, loaded: Tensor) -> None:
    parameter.data.copy_(loaded.add_(1))


def writes_as_an_output(parameter: Tensor, loaded: Tensor) -> None:
    torch.add(loaded, 1, out=parameter.data)


def writes_in_a_list(parameter: Tensor, loaded: Tensor) -> None:
    torch._foreach_copy_([parameter.data], [loaded + 1])


def clears_what_it_wrote(parameter: Tensor, loaded: Tensor) -> None:
    parameter.data.copy_(loaded)
    parameter.data[:1].zero_()


def writes_twice(parameter: Tensor, loaded: Tensor) -> None:
    parameter.data.copy_(loaded)
    parameter.data[1:].copy_(loaded[:-1])


def puts_another_in_its_place(parameter: Tensor, loaded: Tensor) -> None:
    parameter.data = loaded + 1


@pytest.mark.parametrize(
    "loader",
    [
        writes_the_source_first, writes_as_an_output, writes_in_a_list, clears_what_it_wrote, writes_twice,
        puts_another_in_its_place,
    ],
)  # fmt: skip
def test_what_a_loader_does_beside_one_copy_is_noticed(
    loader: Load, configs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = traced_with(loader, None, configs, monkeypatch)
    assert found.ordinary == (NORM,)
    assert NORM not in {need.piece.buffer for need in found.needs}


def test_all_tensors_that_a_loader_collects_are_loaded_the_ordinary_way(
    configs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Tensor] = []

    def of_both(parameter: Tensor, loaded: Tensor) -> None:
        parameter.data.copy_(loaded + kept.pop().sum())

    def collected(_: Load) -> Load:
        return lambda parameter, loaded: kept.append(loaded)

    found, _ = traced_with(of_both, collected, configs, monkeypatch)
    assert found.ordinary == (DOWN, NORM)


def test_a_tensor_that_vllm_has_another_shape_for_is_named(configs: Any) -> None:
    shape = shape_of("qwen3")
    with pytest.raises(ModelsDiffer, match=NORM):
        trace(configs(shape), {**tensors_of(shape), NORM: (49,)}, 0, 1, False)


def test_a_tensor_that_vllm_passes_over_is_named(configs: Any) -> None:
    # vLLM's Qwen3 has no bias behind its attention, whatever its configuration says.
    shape = replace(shape_of("qwen3"), output_bias=True)
    traces = [trace(configs(shape), tensors_of(shape), rank, 2, False) for rank in range(2)]
    with pytest.raises(ModelsDiffer, match=r"5 tensors .* first model.layers.0.self_attn.o_proj.bias"):
        check_taken(traces, tensors_of(shape))


def test_tracing_leaves_nothing_behind_that_an_engine_would_find(configs: Any) -> None:
    from vllm.distributed import parallel_state
    from vllm.model_executor.layers import rotary_embedding

    shape = shape_of("qwen3")
    config = configs(shape)
    rotary_embedding._ROPE_DICT.clear()
    trace(config, tensors_of(shape), 1, 2, False)
    assert rotary_embedding._ROPE_DICT == {} and parallel_state._TP is None
    assert config.compilation_config.static_forward_context == {}
    assert config.parallel_config.tensor_parallel_size == 1
