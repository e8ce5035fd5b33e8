"""The sampler injects what it was asked to, says so, and refuses to go on when it did not.

Every prompt is cut (batches of 32 tokens), sequences are preempted (half of the cache they want), blocks are shared,
and all modes run at once in one batch; the reference is a transformers model hooked token by token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import run_ranks, torchrun


@pytest.fixture(scope="module", params=[2, 1], ids=["tp2", "two_replicas_of_tp1"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    scratch = str(tmp_path_factory.mktemp("engine"))
    return {"tp": request.param, **torchrun("engine_worker", 2, scratch, str(request.param))}


def test_every_mode_gives_the_logprobs_of_a_hooked_transformers_model(found: Any) -> None:
    assert found["gap"] <= 1e-4


def test_a_request_that_takes_no_intervention_needs_no_position(found: Any) -> None:
    assert found["plain"] <= 1e-4


def test_the_requests_were_cut_preempted_and_served_from_the_cache(found: Any) -> None:
    assert min(found["cut"], found["preempted"], found["from_cache"]) > 0


def test_the_vectors_matter_to_the_logprobs(found: Any) -> None:
    assert found["gap_wrong_vectors"] > 1e-2
    assert found["gap_swapped_vectors"] > 1e-2


def test_rollouts_come_in_order_with_explicit_groups(found: Any) -> None:
    assert found["order"] == [[group, sample, group] for group in range(12) for sample in range(2)]


def test_replicas_get_equal_shares(found: Any) -> None:
    assert found["replicas"] == ([24, 24] if found["tp"] == 2 else [12, 12])


def test_sampling_depends_on_the_seeds_alone(found: Any) -> None:
    assert found["repeatable"] is True
    assert found["distinct"] == 2


def test_scoring_given_tokens_gives_the_logprobs_of_sampling_them(found: Any) -> None:
    assert found["score_gap"] <= 1e-5


def test_logprobs_are_those_of_the_tempered_distribution_and_of_temperature_one_where_greedy(found: Any) -> None:
    assert found["tempered_gap"] <= 1e-4
    assert found["greedy"] <= 1e-4
    assert found["tempered_greedy_gap"] <= 1e-4
    assert found["tempered_score_gap"] <= 1e-4


def test_a_score_leaves_nothing_of_its_temperature_to_a_batch_that_is_all_greedy(found: Any) -> None:
    assert found["greedy_after_score"] <= 1e-4


def test_a_prompt_is_shared_with_the_same_vector_and_not_with_another(found: Any) -> None:
    served = found["cache_reports"]
    same = [(computed, cached) for name, computed, cached in served if name.startswith("group 1")]
    other = [(computed, cached) for name, computed, cached in served if name.startswith("group 2")]
    assert same == [("()", "((4, 5),)")]
    assert other == [("((4, 5),)", "()")]


def test_a_cached_marker_of_which_nobody_knows_stops_the_step_and_empties_the_cache(found: Any) -> None:
    assert "first, group 1 (row 1): cached without it at block 1, position 4" in found["cache_unknown"]
    assert found["cache_again"] == "no error"


def test_reloaded_weights_are_the_ones_that_sample_though_the_prompts_were_cached(found: Any) -> None:
    assert found["gap_after_load"] <= 1e-4


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("outside", "InjectionError: position 99 of request group 1"),
        ("not_marker", "InjectionError: token 31 at the marker's position (5)"),
        (
            "no_position",
            "InjectionError: request group 1 (row 1) names positions [] for an intervention at 'positions'",
        ),
        ("neighbour", "InjectionError: token 7 right of the marker (4)"),
        ("too_long", "LayoutError: a prompt of 115 tokens and 28 new ones in group 1"),
        ("greedy_group", "ConfigError: 2 samples of group 1 (row 1), greedy"),
        ("width", "WidthError: vectors of shape"),
        ("nan", "ColumnError: "),
        ("zero", "ColumnError: "),
        ("unknown_intervention", "ConfigError: strengths for 10 interventions and only=(10,)"),
        ("one_position", "InjectionError: request group 11 (row 11) names positions [4] for 2 vectors"),
        ("one_vector", "WidthError: vectors of shape"),
    ],
)
def test_what_cannot_be_served_is_named_before_generation(found: Any, fault: str, message: str) -> None:
    assert found[fault].startswith(message)
    if fault in ("nan", "zero"):
        norm = {"nan": "nan", "zero": "0.0"}[fault]
        assert found[fault].endswith(
            f"vectors cannot be injected; the first, of request group 1 (row 1), has norm {norm}"
        )


def test_a_request_that_is_never_marked_stops_the_step_and_is_named(found: Any) -> None:
    assert "the first, group 1 (row 1): not marked at block 1, position 4 (1 of 1 tokens)" in found["not_marked"]


def test_a_marked_token_that_the_model_did_not_change_stops_the_step(found: Any) -> None:
    assert "the first, group 1 (row 1): 0 of 1 marked tokens changed at block 1" in found["not_applied"]


def test_an_injection_that_only_another_rank_lost_stops_the_step_everywhere(found: Any) -> None:
    assert "on rank 1 did not get what they asked for" in found["not_applied_on_rank_one"]


def test_a_rank_with_other_rollouts_stops_the_step(found: Any) -> None:
    if found["tp"] == 2:
        assert found["other_rank"] == "RolloutError: rank 1 holds other rollouts than rank 0 of its replica"
    assert found["fine_again"] == "no error"


def test_a_cpu_engine_says_that_sleeping_returns_nothing(found: Any) -> None:
    assert found["slept"] is False


def test_an_engine_that_fails_on_one_rank_ends_all_with_its_message(tmp_path: Path) -> None:
    done = run_ranks("failing_worker", 2, str(tmp_path), timeout=120)
    assert done.returncode != 0
    assert "the device of rank 1 is gone" in done.stderr
    assert "past the failure" not in done.stdout
