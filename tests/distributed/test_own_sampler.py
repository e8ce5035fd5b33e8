"""A policy that writes its responses itself: alike on every layout, with the log-probs of hooked transformers."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.own_sampler_worker import LAYOUTS, first_like
from tests.support.credited import PROMPTS, SAMPLES
from tests.support.ranks import torchrun

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
NEW = 9
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return torchrun("own_sampler_worker", 2, str(tmp_path_factory.mktemp("own_sampler")))


def ids(rollouts: list[dict[str, Any]]) -> list[list[int]]:
    return [rollout["response_ids"] for rollout in rollouts]


def logprobs(rollouts: list[dict[str, Any]]) -> list[float]:
    return [value for rollout in rollouts for value in rollout["logprobs"]]


@every_layout
def test_log_probs_are_those_of_transformers(found: Any, layout: str) -> None:
    expected = [value for each in found[first_like(layout)]["expected"] for value in each["logprobs"]]
    assert logprobs(found[layout]["drawn"]) == pytest.approx(expected, abs=1e-4)
    assert logprobs(found[layout]["scored"]) == pytest.approx(expected, abs=1e-4)
    greedy = [value for each in found[first_like(layout)]["expected_greedy"] for value in each["logprobs"]]
    assert logprobs(found[layout]["greedy"]) == pytest.approx(greedy, abs=1e-4)


@every_layout
def test_greedy_tokens_are_the_likeliest(found: Any, layout: str) -> None:
    assert ids(found[layout]["greedy"]) == [each["likeliest"] for each in found[first_like(layout)]["expected_greedy"]]


@every_layout
def test_every_layout_draws_the_same_and_every_sample_another(found: Any, layout: str) -> None:
    drawn = found[layout]["drawn"]
    assert ids(drawn) == ids(found[first_like(layout)]["drawn"]) == ids(found[layout]["again"])
    assert [(each["group"], each["sample"]) for each in drawn] == [
        (group, sample) for group in range(PROMPTS) for sample in range(SAMPLES)
    ]
    assert len({tuple(each) for each in ids(drawn)}) == PROMPTS * SAMPLES
    assert all(1 <= len(each) <= NEW for each in ids(drawn))


@every_layout
def test_the_loop_runs_on_it_and_it_writes_with_the_new_weights(found: Any, layout: str) -> None:
    for step in found[layout]["steps"]:
        assert step["logprob_gap_max"] <= 1e-5
        assert step["injected"] == step["expected_injections"] == PROMPTS * SAMPLES
    assert logprobs(found[layout]["afterwards"]) != logprobs(found[layout]["drawn"])


@every_layout
def test_a_stop_text_ends_a_response(found: Any, layout: str) -> None:
    stop, free, stopped = (found[layout][name] for name in ("stop", "free", "stopped"))
    assert len(stopped[0]["response_ids"]) < len(free[0]["response_ids"])
    for short, whole in zip(stopped, free, strict=True):
        assert short["response_ids"] == whole["response_ids"][: len(short["response_ids"])]
        assert short["finished"] == (stop in short["text"] or whole["finished"])
        assert stop in short["text"] or short["response_ids"] == whole["response_ids"]


@every_layout
def test_of_top_k_1_all_samples_are_the_likeliest(found: Any, layout: str) -> None:
    assert len({tuple(each) for each in ids(found[layout]["free"])}) <= PROMPTS


@every_layout
def test_adapters_and_projections_are_part_of_what_writes(found: Any, layout: str) -> None:
    for step in found[layout]["adapted"]:
        assert step["logprob_gap_max"] <= 1e-5 and step["policy_grad_norm"] > 0
