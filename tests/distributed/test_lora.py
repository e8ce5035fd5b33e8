"""Adapters on TP 1/2/4 x PP 1/2 (DP filling four ranks) are what `peft` has, computes, learns and merges."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.ranks import torchrun

pytestmark = pytest.mark.slow

LAYOUTS = ["tp1 pp1", "tp2 pp1", "tp4 pp1", "tp1 pp2", "tp2 pp2"]
QUANTIZED = ["nf4 tp2 pp1", "nf4 tp2 pp2", "nf4 tp4 pp1"]
"""On 4-bit weights: what is computed, learnt and written is as transformers, bitsandbytes and `peft` have it."""
TRAINED = [*(f"all {layout}" for layout in LAYOUTS), "some tp2 pp1", "some tp2 pp2", *QUANTIZED]
FAMILIES = [
    *(f"{family} {layout}" for family in ("gemma3", "llama-biased") for layout in ("tp2 pp2", "vpp2")),
    *(f"{family} {layout}" for family in ("qwen3-moe", "nf4-moe") for layout in ("tp2 pp2", "vpp2", "ep2 pp2")),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return torchrun("lora_worker", 4, str(tmp_path_factory.mktemp("lora")))


@pytest.mark.parametrize("case", TRAINED + [case for case in FAMILIES if "vpp" not in case])
def test_logits_equal_pefts(found: Any, case: str) -> None:
    assert found[case]["logits"] <= 2e-5


@pytest.mark.parametrize("case", TRAINED + FAMILIES)
def test_what_is_loaded_is_saved_bit_for_bit(found: Any, case: str) -> None:
    assert found[case]["saved"] == 0.0


@pytest.mark.parametrize("case", TRAINED + FAMILIES)
def test_the_merge_of_shards_is_the_merge_of_files(found: Any, case: str) -> None:
    """Each element of B A is a sum over the rank, which no layout cuts."""
    assert found[case]["merged"] <= 2e-7 and found[case]["merged_moves"] > 0.05


@pytest.mark.parametrize("case", TRAINED + FAMILIES)
def test_the_base_keeps_its_bits(found: Any, case: str) -> None:
    """After training and merging too."""
    assert found[case]["base"] == 0.0


@pytest.mark.parametrize("case", TRAINED)
def test_updates_equal_adamw_on_peft(found: Any, case: str) -> None:
    """Two steps, clipped; an error of a matrix is measured against how far it has moved."""
    first, second = found[case]["norms"]
    assert first <= 2e-6 and second <= 1e-4
    assert found[case]["trained"] <= 1e-2


@pytest.mark.parametrize("case", TRAINED)
def test_a_checkpoint_of_another_layout_is_resumed(found: Any, case: str) -> None:
    """Saved on TP 2 after one step: the adapters alone, and everything, with which the second step is then taken."""
    assert found[case]["stepped"] <= 1e-2
    assert found[case]["resumed"] <= 1e-2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fresh_adapters_are_alike_on_every_layout_and_change_nothing(found: Any, layout: str) -> None:
    assert found[f"fresh {layout}"] == {"unchanged": True, "differs": 0.0}
