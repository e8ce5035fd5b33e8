"""Layouts that do not fit are refused by name; blocks are dealt to stages and chunks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nla_megatron.config.schema import ParallelConfig
from nla_megatron.errors import LayoutError
from nla_megatron.models.builder import Use, beside_av, blocks_per_chunk, check_layout, check_rollout_layout
from nla_megatron.parallel.world import data_parallel_size
from nla_megatron.types import Experts
from tests.support.tiny import SHAPE

DENSE = replace(SHAPE, num_layers=7, num_heads=8, num_kv_heads=4, ffn_hidden_size=24)
MIXTURE = replace(DENSE, ffn_hidden_size=25, experts=Experts(6, 2, 30))


@pytest.mark.parametrize(
    ("options", "blocks"),
    [
        ({}, [7]),
        ({"pp": 2}, [4, 3]),
        ({"pp": 3}, [3, 2, 2]),
        ({"pp": 2, "vpp": 2}, [2, 2, 2, 1]),
        ({"pp": 2, "stages": [1, 6]}, [1, 6]),
        ({"pp": 2, "vpp": 2, "stages": [1, 3, 2, 1]}, [1, 3, 2, 1]),
    ],
)
def test_blocks_of_each_chunk_in_the_models_order(options: dict[str, Any], blocks: list[int]) -> None:
    layout = ParallelConfig(**options)
    check_layout(DENSE, layout, "convert")
    assert blocks_per_chunk(7, layout) == blocks


@pytest.mark.parametrize(
    ("shape", "options", "use", "named"),
    [
        (replace(DENSE, num_heads=6), {"tp": 4}, "convert", "6 attention heads at parallel.tp=4"),
        (DENSE, {"tp": 8}, "convert", "4 key/value heads at parallel.tp=8"),
        (replace(DENSE, ffn_hidden_size=26), {"tp": 4}, "convert", "26 feed-forward columns at parallel.tp=4"),
        (DENSE, {"pp": 8}, "convert", "7 blocks at parallel.pp=8"),
        (DENSE, {"pp": 4, "vpp": 2}, "convert", "7 blocks at parallel.pp=4, vpp 2"),
        (DENSE, {"pp": 2, "stages": [3, 3]}, "convert", "parallel.stages=[3, 3] for 7 blocks"),
        (DENSE, {"pp": 2, "stages": [7]}, "convert", "parallel.stages=[7] for 7 blocks"),
        (DENSE, {"ep": 2}, "convert", "parallel.ep=2 for a model without experts"),
        (MIXTURE, {"ep": 4}, "convert", "6 experts at parallel.ep=4"),
        (MIXTURE, {"tp": 4}, "convert", "30 columns of each expert at parallel.etp=4"),
        (MIXTURE, {"etp": 4}, "convert", "30 columns of each expert at parallel.etp=4"),
        (DENSE, {"pp": 2, "vpp": 2}, "forward", "parallel.vpp=2"),
        (DENSE, {"pp": 2, "vpp": 2}, "train", "parallel.vpp=2"),
        (MIXTURE, {"tp": 2, "etp": 1}, "train", "a mixture of experts that trains at parallel.tp=2"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_by_name(
    shape: Any, options: dict[str, Any], use: Use, named: str
) -> None:
    with pytest.raises(LayoutError) as caught:
        check_layout(shape, ParallelConfig(**options), use)
    assert named in caught.value.found


def test_an_ar_beside_an_av_has_stages_of_its_own() -> None:
    """7 blocks of the AV and 4 of the AR: no one list is right for both."""
    layout, reader = ParallelConfig(pp=2, stages=[2, 5], ar_stages=[1, 3]), replace(DENSE, num_layers=4)
    check_layout(DENSE, layout)
    check_layout(reader, beside_av(layout), stages="ar_stages")
    assert (blocks_per_chunk(7, layout), blocks_per_chunk(4, beside_av(layout))) == ([2, 5], [1, 3])
    # Where nothing is said of the AR, it is dealt evenly.
    assert blocks_per_chunk(4, beside_av(replace(layout, ar_stages=None))) == [2, 2]
    with pytest.raises(LayoutError) as caught:
        check_layout(reader, beside_av(replace(layout, ar_stages=[2, 5])), stages="ar_stages")
    assert caught.value.found.startswith("parallel.ar_stages=[2, 5] for 4 blocks")
    assert "parallel.ar_stages" in caught.value.remedy


def test_a_mixture_is_cut_by_its_own_sizes() -> None:
    """Its 25 dense columns are nowhere; tp 4 cuts attention, etp 2 the experts."""
    check_layout(MIXTURE, ParallelConfig(tp=4, etp=2, ep=2), "forward")
    check_layout(MIXTURE, ParallelConfig(ep=3), "train")


@pytest.mark.parametrize(
    ("options", "world", "dp"),
    [
        ({"tp": 2}, 8, 4),
        ({"tp": 2, "ep": 4}, 8, 4),
        ({"tp": 4, "etp": 1, "ep": 4}, 8, 2),
        ({"etp": 2, "ep": 2, "pp": 2}, 8, 4),
        ({"pp": 2, "vpp": 3}, 2, 1),
    ],
)
def test_experts_lie_on_the_ranks_of_a_pipeline_stage(options: dict[str, Any], world: int, dp: int) -> None:
    assert data_parallel_size(ParallelConfig(**options), world) == dp


@pytest.mark.parametrize(
    ("options", "world", "named"),
    [
        ({"ep": 2}, 1, "parallel.ep=2 x etp 1 on the 1 ranks"),
        ({"tp": 2, "ep": 4}, 4, "parallel.ep=4 x etp 2 on the 4 ranks"),
        ({"pp": 2, "ep": 4}, 4, "parallel.ep=4 x etp 1 on the 2 ranks"),
        ({"vpp": 2}, 4, "parallel.vpp=2 at parallel.pp=1"),
        ({"tp": 3}, 4, "4 processes for parallel.tp=3"),
    ],
)
def test_a_world_that_does_not_fit_is_refused_by_name(options: dict[str, Any], world: int, named: str) -> None:
    with pytest.raises(LayoutError) as caught:
        data_parallel_size(ParallelConfig(**options), world)
    assert named in caught.value.found


@pytest.mark.parametrize(
    ("shape", "tp", "world", "message"),
    [
        (DENSE, 3, 4, "4 ranks at rollout.tp=3"),
        (DENSE, 16, 16, "8 attention heads"),
        (replace(DENSE, num_heads=12, num_kv_heads=6), 4, 4, "6 key/value heads"),
        (replace(DENSE, num_heads=9, num_kv_heads=3), 3, 3, "640 vocabulary rows"),
        (replace(DENSE, ffn_hidden_size=22), 4, 4, "22 feed-forward columns"),
        (MIXTURE, 4, 4, "30 columns of each expert"),
    ],
)
def test_a_sampler_that_the_model_does_not_fit_is_refused(shape: Any, tp: int, world: int, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        check_rollout_layout(shape, tp, world)


def test_samplers_that_fit() -> None:
    check_rollout_layout(DENSE, 8, 16)  # two ranks for each key/value head
    check_rollout_layout(MIXTURE, 2, 2)  # no layer has the odd number of columns
    check_rollout_layout(MIXTURE, 4, 4, expert_parallel=True)
