"""An AR with pooling, projection, dropout and regularisers is one model on every layout, saved and exported too."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.heads_worker import LAYOUTS, SPECS
from tests.support.ranks import torchrun

pytestmark = pytest.mark.slow

CASES = [(name, layout) for name in SPECS for layout in LAYOUTS]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return torchrun("heads_worker", 4, str(tmp_path_factory.mktemp("heads")))


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_every_layout_learns_alike(found: Any, name: str, layout: str) -> None:
    one, other = found[f"{name} tp1 pp1"], found[f"{name} {layout}"]
    assert other["start"] == pytest.approx(one["start"], abs=2e-5)
    for mine, theirs in zip(other["steps"], one["steps"], strict=True):
        assert mine == pytest.approx(theirs, rel=2e-4)
    assert one["steps"][-1][0] < one["steps"][0][0]
    assert other["first"] == pytest.approx(one["first"], abs=1e-3)


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_an_export_computes_the_same_in_plain_torch(found: Any, name: str, layout: str) -> None:
    numbers = found[f"{name} {layout}"]
    assert numbers["by torch"] == pytest.approx(numbers["first"], abs=2e-5)


@pytest.mark.parametrize("name", SPECS)
def test_a_checkpoint_of_one_layout_goes_on_on_another(found: Any, name: str) -> None:
    [last] = found[f"{name} tp2 pp2"]["resumed"]
    assert last == pytest.approx(found[f"{name} tp1 pp1"]["steps"][-1], rel=2e-5)
