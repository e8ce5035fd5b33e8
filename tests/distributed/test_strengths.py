"""A predictor's gradient through a frozen model is the same on every layout, and is transformers'."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.strengths_worker import LAYOUTS, RUNS
from tests.support.ranks import torchrun


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return torchrun("strengths_worker", 4, str(tmp_path_factory.mktemp("strengths")))


@pytest.mark.parametrize(("layout", "case"), RUNS)
def test_logprobs_and_the_predictors_gradient_equal_a_hooked_transformers_model(
    found: Any, layout: str, case: str
) -> None:
    numbers = found[layout][case]
    assert numbers["gradient"] <= 1e-5
    assert numbers["logprob"] <= 2e-5 and numbers["features"] <= 1e-5 and numbers["loss"] <= 1e-5
    assert numbers["alike"], "every rank has the same gradient, bit for bit"
    assert numbers["unchanged"], "no weight of the frozen model changed"


def test_other_weights_would_be_seen(found: Any) -> None:
    assert found["wrong weights"]["gradient"] > 1e-3


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "dp4"])
def test_a_checkpoint_of_one_layout_goes_on_alike_on_another(found: Any, layout: str) -> None:
    straight = found["resumed"]["straight"]
    assert found["resumed"][layout] == pytest.approx(straight[2:], rel=1e-5)
    assert straight[4] < straight[2] < straight[0]
