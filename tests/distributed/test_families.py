"""Every family: import and export on any layout are exact, and the model computes what transformers does."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.families_worker import (
    COMPUTED,
    RESHARDED,
    TRAINED,
    WITHOUT_HEAD,
    layouts_of,
    wide_layouts_of,
)
from tests.support.families import MODELS
from tests.support.ranks import torchrun

pytestmark = pytest.mark.slow

CASES = [(name, layout) for name in MODELS for layout in layouts_of(name)]
WIDE_CASES = [(name, layout) for name in MODELS for layout in wide_layouts_of(name)]
COMPUTED_CASES = [(name, layout) for name, layout in CASES if layout in COMPUTED]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return torchrun("families_worker", 4, str(tmp_path_factory.mktemp("families")))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return torchrun("families_worker", 8, str(tmp_path_factory.mktemp("wide")), "wide")


@pytest.mark.parametrize(("name", "layout"), WIDE_CASES)
def test_eight_ranks_are_bit_exact_and_compute_what_transformers_does(wide: Any, name: str, layout: str) -> None:
    found = wide[f"{name} {layout}"]
    assert found["different"] == [] and found["logits"] <= 2e-5


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_import_then_export_is_bit_exact_on_every_rank(found: Any, name: str, layout: str) -> None:
    assert found[f"{name} {layout}"]["different"] == []


@pytest.mark.parametrize(("name", "layout"), COMPUTED_CASES)
def test_logits_are_those_of_transformers(found: Any, name: str, layout: str) -> None:
    assert found[f"{name} {layout}"]["logits"] <= 2e-5


@pytest.mark.parametrize(("name", "layout"), [case for case in COMPUTED_CASES if case[0] in WITHOUT_HEAD])
def test_the_truncated_backbone_gives_the_residual_stream_of_transformers(found: Any, name: str, layout: str) -> None:
    assert found[f"{name} {layout}"]["stream"] <= 2e-5


@pytest.mark.parametrize(("name", "layout"), TRAINED)
def test_loss_and_gradients_are_those_of_transformers(found: Any, name: str, layout: str) -> None:
    loss, norm = found[f"{name} {layout}"]["learned"]
    assert loss <= 1e-5 and norm <= 1e-4


@pytest.mark.parametrize(("name", "layouts"), RESHARDED.items())
def test_a_distributed_checkpoint_of_one_layout_loads_on_another(
    found: Any, name: str, layouts: tuple[str, str]
) -> None:
    assert found[f"{name} {layouts[1]}"]["resharded"] == []
