"""Which runs `eval` can be asked about; it is asked in the run's own task, on rows that nobody trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nla_megatron.config.compose import compose
from nla_megatron.config.run_directory import flat
from nla_megatron.config.schema import EvalConfig, TaskConfig
from nla_megatron.evaluation.command import EVALUATIONS
from nla_megatron.evaluation.evaluable import FIGURES_OF, can_be_evaluated, evaluation_words, will_have
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
    assert will_have("nla", "fve_av") and not will_have("nla", "beauty")
    assert will_have("nla", "named_gold.city.found", ["city"]) and not will_have("nla", "named_gold.city.found")
    assert not will_have("nla", "named_gold.town.found", ["city"]) and not will_have("nla", "named_gold.city", ["city"])
