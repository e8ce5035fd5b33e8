"""Whatever requests come and go, each token is changed as its own request asks, and no other is touched."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.ranks import torchrun

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return torchrun("mixes_worker", 1, str(tmp_path_factory.mktemp("mixes")))


def test_200_random_mixes_change_every_token_as_asked_and_settle_their_accounts(found: Any) -> None:
    assert found["mixes"] >= 200


def test_the_mixes_had_aborts_preemptions_and_shared_prompts_in_them(found: Any) -> None:
    assert min(found[what] for what in ("changed", "aborted", "preempted", "cached")) >= 10


def test_a_compiled_model_intervenes_like_an_eager_one(found: Any) -> None:
    assert found["mode"] == "DYNAMO_TRACE_ONCE"
    assert found["gap_of_compiled"] <= 1e-5


def test_logprobs_of_filtered_samples_are_those_of_the_whole_distribution(found: Any) -> None:
    assert found["gap_of_filtered"] <= 1e-5
