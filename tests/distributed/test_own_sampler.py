"""A policy that writes its responses itself: alike on every layout, with the log-probs of hooked transformers."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.own_sampler_worker import LAYOUTS
from tests.support.credited import PROMPTS, SAMPLES
from tests.support.ranks import torchrun

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
    expected = [value for each in found[LAYOUTS[0]]["expected"] for value in each["logprobs"]]
    assert logprobs(found[layout]["drawn"]) == pytest.approx(expected, abs=1e-4)
    assert logprobs(found[layout]["scored"]) == pytest.approx(expected, abs=1e-4)
    greedy = [value for each in found[LAYOUTS[0]]["expected_greedy"] for value in each["logprobs"]]
    assert logprobs(found[layout]["greedy"]) == pytest.approx(greedy, abs=1e-4)


@every_layout
def test_greedy_tokens_are_the_likeliest(found: Any, layout: str) -> None:
    assert ids(found[layout]["greedy"]) == [each["likeliest"] for each in found[LAYOUTS[0]]["expected_greedy"]]


@every_layout
def test_every_layout_draws_the_same_and_every_sample_another(found: Any, layout: str) -> None:
    drawn = found[layout]["drawn"]
    assert ids(drawn) == ids(found[LAYOUTS[0]]["drawn"]) == ids(found[layout]["again"])
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
    stop, rollouts = found[layout]["stopped"]["stop"], found[layout]["stopped"]["rollouts"]
    for rollout in rollouts:
        assert stop not in rollout["text"] or (rollout["finished"] and rollout["text"].index(stop) >= 0)
        assert rollout["finished"] or len(rollout["response_ids"]) == NEW
    # The likeliest token alone is left of top_k=1, so all samples of a prompt are one.
    assert len({tuple(each) for each in ids(rollouts)}) == PROMPTS
