"""Which runs `eval` can be asked about; it is asked in the run's own task, on rows that nobody trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nla_megatron.config.compose import compose
from nla_megatron.config.run_directory import flat
from nla_megatron.config.schema import EvalConfig, RewardConfig, TaskConfig
from nla_megatron.evaluation.command import EVALUATIONS
from nla_megatron.evaluation.evaluable import FIGURES_OF, can_be_evaluated, evaluation_words, models_of, will_have
from nla_megatron.evaluation.runs import Run, find_runs
from nla_megatron.tasks.text import Data, open_task
from nla_megatron.types import Rollout
from tests.support.runs import left_run
from tests.support.tiny import tiny_model

GENERATED = "task.options.provider=generated"
OWN = "task.options.held_out={provider: generated, options: {start: 900, size: 9}}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


def run_of(folder: Path, *words: str) -> Run:
    left_run(folder / "a", "steps=1", *words)
    [run], _ = find_runs(folder, "rl", folder / "out")
    return run


@pytest.mark.parametrize(
    ("words", "data", "expected"),
    [
        (("held_out=held.parquet",), None, True),
        ((), "held.parquet", True),
        ((), None, False),
        (("task=math", "held_out=test.jsonl"), None, True),
        (("task=math", OWN), None, True),
        (("task=math", "data=''", GENERATED), None, False),
        (("task=math", "data=''", GENERATED), "test.jsonl", True),
        (("task=lexical", "data=''"), None, True),
        (("task=lexical", "data=''", "task.options.held_out_fraction=0"), None, False),
        (("task=lexical", "data=prompts.jsonl"), None, False),
        (("task=sae", "held_out=held.jsonl"), None, True),
        (("task=sae", "data=prompts.jsonl"), None, False),
        (("task=sae", "data=''"), None, True),
    ],
)
def test_a_run_needs_a_task_that_eval_knows_and_rows_it_did_not_train_on(
    model: Path, tmp_path: Path, words: tuple[str, ...], data: str | None, expected: bool
) -> None:
    assert can_be_evaluated(run_of(tmp_path, f"model={model}", *words), data) is expected


def test_an_evaluation_is_of_the_runs_own_task(tmp_path: Path) -> None:
    given = {
        "template": "Solve {prompt}\nIt's \\boxed{}, 'quoted' \\", "plain": "a, b: {prompt} = [", "chat": None,
        "chat_options": {"enable_thinking": True, "budget": 1.5},
    }  # fmt: skip
    config = TaskConfig("math", {"provider": "table", "provider_options": {"limit": 3}, "prompt": given})
    run = run_of(tmp_path, "task=math", "held_out='a,b=c.jsonl'")
    asked: dict[str, Any] = {**run.record["task"], "options": {**run.record["task"]["options"], **config.options}}
    told = Run(run.name, run.directory, {**run.record, "task": asked}, ())
    words = evaluation_words(told, {"model": "/runs/x=1,y=2/hf"}, None)
    composed: EvalConfig = compose("eval", [*words, "out=x"])
    assert composed.task.name == "math" and composed.task.options == asked["options"]
    assert (composed.model, composed.data) == ("/runs/x=1,y=2/hf", "a,b=c.jsonl")


STEERED = (
    "task=sae",
    "held_out=held.jsonl",
    "model=base",
    "task.options.prompts={name: lexical, options: {prompt_words: 3}}",
)


def test_of_a_steered_run_its_predictor_is_evaluated_by_its_own_reward(tmp_path: Path) -> None:
    reward = ("~reward.terms.reconstruction", "+reward.terms.length_hinge={weight: 2, options: {cap: 9, margin: 3}}")
    run = run_of(tmp_path, *STEERED, *reward, "task.options.predictor.hidden=4")
    [part] = models_of(run)
    composed: EvalConfig = compose("eval", [*evaluation_words(run, {part.key: "/runs/a=1/predictor"}, None), "out=x"])
    assert (composed.model, composed.data, composed.task.name) == ("base", "held.jsonl", "sae")
    assert composed.task.options["predictor"]["path"] == "/runs/a=1/predictor"
    # Its form, and what it steers, are in its file.
    shipped = compose("eval", ["task=sae", "out=x"]).task.options
    assert {**composed.task.options["predictor"], "path": None} == shipped["predictor"]
    assert composed.task.options["interventions"] == []
    assert composed.task.options["prompts"] == {"name": "lexical", "options": {"prompt_words": 3}}
    assert composed.reward == compose("rl", ["out=x", *reward]).reward
    assert (part.exported, part.module) == ("predictor", "predictor")


def test_nothing_was_rewarded_where_target_strengths_were_fitted(tmp_path: Path) -> None:
    words = evaluation_words(run_of(tmp_path, *STEERED, "task.options.objective=mse"), {}, None)
    assert compose("eval", [*words, "out=x"]).reward == RewardConfig()


def test_without_steering_the_model_is_evaluated_in_the_task_of_its_prompts(tmp_path: Path) -> None:
    run = run_of(tmp_path, *STEERED, "task.options.steering=false")
    [part] = models_of(run)
    assert (part.key, part.exported) == ("model", "hf")
    composed: EvalConfig = compose("eval", [*evaluation_words(run, {"model": "/runs/a/hf"}, None), "out=x"])
    assert (composed.model, composed.task.name, composed.reward) == ("/runs/a/hf", "lexical", RewardConfig())
    assert composed.task.options["prompt_words"] == 3


def test_the_figures_of_every_task_are_known_before_there_are_any(model: Path) -> None:
    assert set(FIGURES_OF) == set(EVALUATIONS)
    options = {"math": {"provider": "generated"}, "lexical": {}}
    for name in ("math", "lexical"):
        task = open_task(TaskConfig(name, options[name]), Data(), str(model), 0)
        assert task is not None
        rollouts = [Rollout(0, sample, 0, (1,), (5, 6), (0.0, 0.0), "", True) for sample in range(2)]
        figures = task.figures(task.measure(rollouts))
        assert torch.is_tensor(task.main(task.measure(rollouts))[1])
        numbers = list(flat(figures))
        assert [key for key in numbers if will_have(name, key)] == numbers and will_have(name, numbers[0] + "_ci95_low")
        assert not will_have(name, numbers[0] + "_of_nothing")
    for name in ("reward_gain", "reward_gain_ci95_low", "accuracy_plain", "richness", "richness_gain",
                 "words_mean_plain", "truncated_plain", "strengths.block1_feature3.mean"):  # fmt: skip
        assert will_have("sae", name), name
    assert not will_have("sae", "fve_av") and not will_have("sae", "beauty")
    assert will_have("nla", "fve_av") and not will_have("nla", "beauty")
    assert will_have("nla", "named_gold.city.found", ["city"]) and not will_have("nla", "named_gold.city.found")
    assert not will_have("nla", "named_gold.town.found", ["city"]) and not will_have("nla", "named_gold.city", ["city"])
