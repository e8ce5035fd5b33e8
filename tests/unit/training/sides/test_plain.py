"""What the side of plain language models checks before a run, and how it keeps responses of before and after."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nla_megatron.config.compose import compose
from nla_megatron.contract.journal import read_rows
from nla_megatron.errors import ConfigError, LayoutError, MissingFile, NlaError
from nla_megatron.tasks.text import Data, open_task
from nla_megatron.training.sides import side_of
from nla_megatron.training.sides.plain import PlainSide, keep_examples


@pytest.mark.parametrize("task", ["math", "lexical"])
def test_text_tasks_have_the_plain_side(task: str) -> None:
    assert side_of(compose("rl", ["out=x", f"task={task}"])) is PlainSide  # type: ignore[comparison-overlap]


def test_the_check_tells_how_many_prompts_there_are_and_the_longest(directory: Path, tmp_path: Path) -> None:
    config = compose("rl", [f"out={tmp_path}", "task=lexical", f"model={directory}", "rollout.max_new_tokens=20"])
    task = open_task(config.task, Data(), config.model, 0)
    assert task is not None
    found = PlainSide.check(config, 1)
    assert found.rows == task.rows
    assert found.longest == max(len(task.prompt_ids(row)) for row in range(task.rows))


@pytest.mark.parametrize(
    ("overrides", "kind", "named"),
    [
        (["task=lexical", "model="], ConfigError, "no model"),
        (["task=lexical", "model=/nowhere"], MissingFile, "/nowhere"),
        (["task=lexical", "data=/nowhere.jsonl"], MissingFile, "/nowhere.jsonl"),
        (["task=lexical", "held_out=/nowhere.jsonl"], MissingFile, "/nowhere.jsonl"),
        (["task=lexical", "rollout.max_new_tokens=256"], LayoutError, "rollout.max_new_tokens=256"),
        (["task=math", "eval_every=1", "task.options.provider=generated"], ConfigError, "eval_every=1"),
        (["task=math"], ConfigError, "path='' and hub=''"),
    ],
)
def test_mistakes_are_named_before_a_model_is_made(
    model_dir: Path, tmp_path: Path, overrides: list[str], kind: type[NlaError], named: str
) -> None:
    config = compose("rl", [f"out={tmp_path}", f"model={model_dir}", "rollout.max_new_tokens=20", *overrides])
    with pytest.raises(kind) as caught:
        PlainSide.check(config, 1)
    assert type(caught.value) is kind and named in caught.value.found


def test_responses_of_the_first_and_the_last_evaluation_stand_side_by_side(tmp_path: Path) -> None:
    for done in (4, 8, 12):
        keep_examples(tmp_path, done, [{"prompt": each, "response": f"{each} {done}"} for each in ("a", "b")])
    pairs = [json.loads(line) for line in (tmp_path / "before_after.jsonl").read_text().splitlines()]
    assert [pair["prompt"] for pair in pairs] == ["a", "b"]
    assert [(pair["before"]["step"], pair["after"]["step"]) for pair in pairs] == [(4, 12)] * 2
    assert pairs[1]["after"]["response"] == "b 12"
    assert len(list((tmp_path / "evaluations").iterdir())) == 3
    # A run that is resumed makes an evaluation again, in the place of the one before.
    keep_examples(tmp_path, 12, [{"prompt": each, "response": "again"} for each in ("a", "b")])
    assert len(list((tmp_path / "evaluations").iterdir())) == 3
    assert json.loads((tmp_path / "before_after.jsonl").read_text().splitlines()[0])["after"]["response"] == "again"


def test_a_response_may_hold_what_ends_a_line_elsewhere(tmp_path: Path) -> None:
    for done in (0, 4):
        keep_examples(tmp_path, done, [{"prompt": "a\u2028b", "response": f"\x85{done}"}])
    [pair] = read_rows(tmp_path / "before_after.jsonl")
    assert (pair["prompt"], pair["before"]["response"], pair["after"]["response"]) == ("a\u2028b", "\x850", "\x854")
