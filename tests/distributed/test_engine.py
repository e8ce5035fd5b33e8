"""The sampler injects what it was asked to, says so, and refuses to go on when it did not."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.ranks import torchrun


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return torchrun("engine_worker", 2, str(tmp_path_factory.mktemp("engine")))


def test_sampled_logprobs_equal_a_hooked_transformers_model(found: Any) -> None:
    assert found["gap"] <= 1e-4


def test_the_vectors_matter_to_the_logprobs(found: Any) -> None:
    assert found["gap_wrong_vectors"] > 1e-2


def test_every_request_is_injected_once_and_counted(found: Any) -> None:
    assert found["counts"] == [15, 15]


def test_rollouts_come_in_order_with_explicit_groups_though_all_prompts_are_equal(found: Any) -> None:
    assert found["order"] == [[group, sample, group] for group in range(5) for sample in range(3)]


def test_sampling_depends_on_the_seeds_alone(found: Any) -> None:
    assert found["repeatable"] is True
    assert found["distinct_in_group"] == 3


def test_scoring_given_tokens_gives_the_logprobs_of_sampling_them(found: Any) -> None:
    assert found["score_gap"] <= 1e-5


def test_logprobs_are_those_of_the_tempered_distribution(found: Any) -> None:
    assert found["tempered_gap"] <= 1e-4
    assert found["score_refused"].startswith("ConfigError: rollout.temperature=0.7")


def test_reloaded_weights_are_the_ones_that_sample(found: Any) -> None:
    assert found["gap_after_load"] <= 1e-4


def test_a_request_that_is_never_marked_stops_the_step(found: Any) -> None:
    assert found["not_marked"] == "InjectionError: 0 of 15 requests injected, 0 of 0 marked tokens changed"


def test_a_marked_token_that_the_model_did_not_change_stops_the_step(found: Any) -> None:
    assert found["not_applied"] == "InjectionError: 15 of 15 requests injected, 0 of 15 marked tokens changed"


def test_an_injection_that_only_another_rank_of_the_replica_lost_stops_the_step(found: Any) -> None:
    assert found["not_applied_on_rank_one"].startswith(
        "InjectionError: rank 1 injected 15 requests and changed 0 of 15"
    )


def test_a_rank_with_other_rollouts_stops_the_step(found: Any) -> None:
    assert found["other_rank"] == "RolloutError: rank 1 holds other rollouts than rank 0 of its replica"
    assert found["fine_again"] == "no error"
