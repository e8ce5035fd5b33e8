"""A LoRA policy samples as an adapter beside the base's weights, injected like any other, and is replaced whole."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.ranks import torchrun


@pytest.fixture(scope="module", params=[2, 1], ids=["tp2", "two_replicas_of_tp1"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    scratch = str(tmp_path_factory.mktemp("adapter"))
    return {"tp": request.param, **torchrun("adapter_worker", 2, scratch, str(request.param))}


def test_the_trainers_adapter_gives_the_logprobs_of_peft_and_of_the_merged_weights(found: Any) -> None:
    assert found["gap"] <= 1e-4
    assert found["gap_to_merged"] <= 1e-4
    assert found["gap_to_base"] > 1e-2


def test_an_adapter_replaces_the_one_before_and_what_that_one_cached(found: Any) -> None:
    assert found["gap_of_second"] <= 1e-4
    assert found["gap_to_first"] > 1e-2
    assert found["from_cache"] == [4, 0]


def test_an_adapter_goes_by_its_plan_alone_to_the_logprobs_of_peft(found: Any) -> None:
    assert found["gap_planned"] <= 1e-4
    assert found["gap_to_second"] > 1e-2
    assert found["no_adapters"].startswith("CheckpointError: a model without adapters")


def test_what_travels_of_an_adapter_is_what_vllm_keeps_of_it_and_another_stage_holds(found: Any) -> None:
    sent, needed = found["planned_bytes"]
    # q of rank 4 (64 -> 128), v of rank 8 (64 -> 64), down of rank 8 (96 -> 64), three blocks, fp32, on two ranks.
    q, v, down = (4 * 64, 4 * 128), (8 * 64, 8 * 64), (8 * 96, 8 * 64)
    cut = 2 if found["tp"] == 2 else 1
    per_block = q[0] + q[1] // cut + v[0] + v[1] // cut + down[0] // cut + down[1]
    assert needed == 2 * 3 * 4 * per_block
    # Of three blocks each rank holds its own stage's.
    assert sent == 3 * 4 * per_block


def test_the_trainers_tensors_stay_what_they_are(found: Any) -> None:
    assert found["untouched"] is True


def test_an_adapter_stays_when_the_base_gets_other_weights(found: Any) -> None:
    assert found["gap_on_other_base"] <= 1e-4


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("not_loaded", "ConfigError: rollout.lora=adapter and no adapter"),
        ("not_asked_for", "ConfigError: an adapter with rollout.lora=merged"),
        ("too_large", "ConfigError: an adapter of rank 8"),
        ("half", "CheckpointError: matrices of ranks"),
        ("rank", "CheckpointError: matrices of ranks"),
        ("no_pair", "UnsupportedModel: tensor 'lm_head.weight' of an adapter"),
        ("stranger", "UnsupportedModel: an adapter of model.layers.7."),
    ],
)
def test_an_adapter_that_cannot_be_served_is_named(found: Any, fault: str, message: str) -> None:
    assert found[fault].startswith(message)


def test_an_adapter_that_was_refused_leaves_the_one_before(found: Any) -> None:
    assert found["gap_after_faults"] <= 1e-4


def test_a_stop_text_ends_a_response_and_belongs_to_it(found: Any) -> None:
    stop, text = found["stopped_text"]
    free, ids, logprobs = found["stopped_lengths"]
    assert stop in text and found["stopped_finished"] == [False, True]
    assert found["stopped_prefix"] is True
    assert ids == logprobs < free
