"""Four workers convert every family exactly, in little memory, and megatron-core reads and writes the same format."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.convert_worker import CUT, NAMINGS, SAVED
from tests.support.families import MODELS
from tests.support.ranks import torchrun

NOISE = 24 << 20  # code that is imported and touched for the first time, and the allocator's rests


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return torchrun("convert_worker", 4, str(tmp_path_factory.mktemp("convert")))


@pytest.mark.parametrize("name", MODELS)
def test_import_and_export_by_four_workers_are_bit_exact(found: Any, name: str) -> None:
    assert found[name]["back"] == []


@pytest.mark.parametrize("name", CUT)
def test_megatron_core_loads_an_import_at_tp2_pp2_bit_exact(found: Any, name: str) -> None:
    assert found[name]["official load"] == []


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("name", SAVED)
def test_what_megatron_core_saves_at_tp2_pp2_exports_bit_exact(found: Any, name: str, naming: str) -> None:
    """Behind a prefix, as other tools save, with each way of naming blocks and experts."""
    assert found[name][f"back {naming}"] == []


def test_a_training_checkpoint_exports_bit_exact_with_its_base_models_configuration(found: Any) -> None:
    assert found["trained"] == {"av": [], "ar": [], "blocks": 3, "head": True}


@pytest.mark.parametrize("name", CUT)
def test_shards_of_a_live_model_written_by_several_ranks_are_bit_exact(found: Any, name: str) -> None:
    assert found[name]["live"] == []


@pytest.mark.parametrize("direction", ["import", "export"])
def test_a_worker_holds_at_most_twice_the_largest_tensor(found: Any, direction: str) -> None:
    """Tensors are written in their place, so there is no shard buffer on top."""
    memory = found["memory"]
    assert memory["different"] == []
    assert memory["model"] > 2 * memory["largest"] + 2 * NOISE, "a worker that held the model would not be noticed"
    assert max(peaks[direction] for peaks in memory["peaks"]) <= 2 * memory["largest"] + NOISE
