"""A plain language model is sampled by the engine that injects: no intervention, no position, no vector.

The reference is the same model in transformers.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.ranks import torchrun


@pytest.fixture(scope="module", params=[2, 1], ids=["tp2", "two_replicas_of_tp1"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return torchrun("text_worker", 2, str(tmp_path_factory.mktemp("text")), str(request.param))


def test_rollouts_come_in_order_with_the_prompts_of_their_rows(found: Any) -> None:
    assert found["order"] == [[group, sample, row] for group, row in enumerate((5, 2, 9, 0)) for sample in range(2)]
    assert found["prompts"] is True and found["injections"][0] == found["injections"][1]


def test_scores_are_at_the_temperature_that_is_sampled_at(found: Any) -> None:
    assert found["gap"] <= 1e-4 and found["score_gap"] <= 1e-4
    assert found["gap_at_another_temperature"] > 1e-2


def test_samples_depend_on_the_seeds_alone(found: Any) -> None:
    assert found["repeatable"] is True and found["distinct"] == 8


def test_responses_are_measured(found: Any) -> None:
    assert len(found["words"]) == len(found["texts"]) == 8 and sum(found["words"]) > 0
