"""Weights go from any training layout to any sampler's, bit for bit, and not a byte travels that need not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import torchrun

CASES = (
    "tp2 to tp1", "tp1 to tp2", "tp4 to tp2", "tp2 to tp2", "pp2 to tp2, tied", "tp2 pp2 uneven to tp2",
    "pp2 vpp2 to tp4", "ep2 to tp2", "ep2 to tp2 with expert parallelism",
    "pp2 ep2 etp1 to tp4 with expert parallelism", "tp2 ep2 etp2 to tp1", "fp32 to bf16", "adapters merged on the way",
    "other ranks sample", "masters of bf16 to fp32", "masters of bf16 to fp32, two replicas",
    "masters of bf16 to bf16, four replicas",
)  # fmt: skip
NOTHING_TO_SEND = ("tp1 to tp2", "tp2 to tp2", "ep2 to tp2 with expert parallelism")
STAGING = 1 << 15


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return torchrun("reshard_worker", 4, str(tmp_path_factory.mktemp("reshard")))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return torchrun("reshard_engine_worker", 4, str(tmp_path_factory.mktemp("engine")))


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_is_what_vllm_loads_from_full_tensors(found: Any, case: str) -> None:
    assert found[case]["different"] == []


@pytest.mark.parametrize("case", CASES)
def test_bytes_sent_are_the_lower_bound_and_staging_is_bounded(found: Any, case: str) -> None:
    assert found[case]["sent"] == found[case]["received"] == found[case]["bound"]
    assert (found[case]["sent"] == 0) == (case in NOTHING_TO_SEND)
    assert found[case]["staging"] <= STAGING


@pytest.mark.parametrize("layout", ["tp2 pp2", "tp1"])
def test_a_running_engine_has_the_logprobs_of_its_own_load_bit_for_bit(engine: Any, layout: str) -> None:
    assert engine[f"{layout} before"] == ["False"]
    assert engine[layout] == ["True"]


def test_a_load_after_one_that_broke_off_makes_the_engine_whole(engine: Any) -> None:
    assert engine["broken off"] == ["NotFinite"]
    assert engine["after breaking off"] == ["True"]


def test_a_loader_that_is_no_copy_loads_by_the_ordinary_path_and_says_so(engine: Any) -> None:
    assert engine["transformed"] == engine["ordinary tensors"] == ["True"]
    assert engine["ordinary before"] == engine["ordinary again before"] == ["False"]
    assert engine["ordinary"] == engine["ordinary again"] == ["True"]
    [line] = engine["ordinary told"]
    assert "2 tensors, first model.layers.1.mlp.down_proj.weight" in line


def test_replicas_that_differ_nan_and_another_model_are_named_on_all_ranks(engine: Any) -> None:
    assert engine["replicas apart"] == ["ReshardMismatch"]
    assert engine["nan"] == ["NotFinite"]
    assert engine["other model"] == ["ModelsDiffer"]
    assert engine["no adapters"] == ["ConfigError"]


def test_a_half_loaded_engine_does_not_generate(engine: Any) -> None:
    assert engine["refused after"] == ["HalfLoaded"]


def test_other_ranks_than_the_trainers_run_the_engine_and_get_every_byte_once(tmp_path: Path) -> None:
    found = torchrun("reshard_apart_worker", 4, str(tmp_path))
    engines, sent, needed, local = zip(*found, strict=True)
    assert engines == ({}, {}, {"before": False, "after": True}, {"before": False, "after": True})
    assert needed[:2] == sent[2:] == local[2:] == (0, 0)
    assert sum(sent) == sum(needed) > 0
