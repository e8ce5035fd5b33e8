"""The task as a whole: what it measures of responses made by hand, its figures, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nla_megatron.config.compose import compose
from nla_megatron.config.schema import TaskConfig
from nla_megatron.errors import ColumnError, ConfigError, LayoutError, MissingFile
from nla_megatron.tasks.math.task import MathTask, pass_at
from nla_megatron.tasks.text import Data, TextTask, open_task
from nla_megatron.types import Measured, Rollout

PROBLEMS = [
    {"problem": "Half of one?", "solution": "\\boxed{\\frac{1}{2}}", "level": "Level 1", "type": "Algebra"},
    {"problem": "A thousand?", "solution": "\\boxed{1{,}000}", "level": "Level 2", "type": "Algebra"},
    {"problem": "Unknown?", "solution": "nothing", "level": "Level 2", "type": "Algebra"},
]
# row, response, finished; then texts, correct, format, answer_found, thinking
CASES = [
    (0, "<think>a b</think>\\boxed{0.5}", True, "0.5", 1, 1, 1, "a b"),
    (0, "<think>a b</think>\\boxed{0.5}", False, None, 1, 0, 1, "a b"),
    (0, "\\boxed{1/2}", True, None, 1, 0, 1, ""),
    (0, "<think>wrong</think>\\boxed{2}", True, "2", 0, 1, 1, "wrong"),
    (1, "<think></think>\\boxed{$1000}", True, "$1000", 1, 1, 1, ""),
    (1, "<think>and on and on", False, None, 0, 0, 0, "and on and on"),
    (1, "", True, None, 0, 0, 0, ""),
    (1, "\n#### 1e3", True, None, 1, 0, 1, ""),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("math") / "math.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    return path


def opened(model: Path, data: Path | str | Data = "", **options: Any) -> TextTask:
    config = TaskConfig("math", {"provider": "hendrycks_math", **options})
    task = open_task(config, data if isinstance(data, Data) else Data(str(data)), str(model), 0)
    assert task is not None
    return task


def rollouts(task: TextTask, cases: Sequence[tuple[Any, ...]], samples: int = 4) -> list[Rollout]:
    made = []
    for index, (row, text, finished, *_) in enumerate(cases):
        ids = task.tokenizer.encode(text)
        if finished:
            ids = [*ids, task.tokenizer.end_id]
        made.append(
            Rollout(index // samples, index % samples, row, task.prompt_ids(row), tuple(ids), (0.0,) * len(ids), text,
                    finished)
        )  # fmt: skip
    return made


def test_responses_are_measured_exactly(model_dir: Path, data: Path) -> None:
    task = opened(model_dir, data)
    measured = task.measure(rollouts(task, CASES))
    assert measured.texts == tuple(case[3] for case in CASES)
    assert measured.references == ("\\frac{1}{2}",) * 4 + ("1{,}000",) * 4
    for position, name in ((4, "correct"), (5, "format"), (6, "answer_found")):
        assert measured.values[name].tolist() == [case[position] for case in CASES], name
        assert measured.values[name].dtype == torch.float32
    lengths = [len(task.tokenizer.encode(case[7])) for case in CASES]
    assert measured.values["thinking_tokens"].tolist() == lengths and max(lengths) > 3
    assert measured.failed.tolist() == [case[3] is None for case in CASES]
    assert measured.counts == {"references_unreadable": 1.0}


def test_correctness_can_be_asked_of_the_strict_answer_alone(model_dir: Path, data: Path) -> None:
    task = opened(model_dir, data, answers="strict")
    measured = task.measure(rollouts(task, CASES))
    assert measured.values["correct"].tolist() == [case[4] * case[5] for case in CASES]


def test_figures_are_those_of_the_responses(model_dir: Path, data: Path) -> None:
    task = opened(model_dir, data)
    made = rollouts(task, CASES)
    measured = task.measure(made)
    figures = task.figures(measured)
    thinking, length = measured.values["thinking_tokens"].numpy(), [len(each.response_ids) for each in made]
    assert figures["accuracy"] == pytest.approx(5 / 8)
    assert figures["accuracy_strict"] == pytest.approx(2 / 8)
    assert figures["format_rate"] == pytest.approx(3 / 8)
    assert figures["answer_found"] == pytest.approx(6 / 8)
    assert figures["truncated"] == pytest.approx(2 / 8)
    assert figures["thinking_tokens_mean"] == pytest.approx(thinking.mean())
    assert figures["thinking_tokens_median"] == pytest.approx(np.median(thinking))
    assert figures["thinking_tokens_p90"] == pytest.approx(np.percentile(thinking, 90))
    assert figures["response_tokens_mean"] == pytest.approx(np.mean(length))
    assert figures["accuracy_by_level"] == {"Level 1": pytest.approx(3 / 4), "Level 2": pytest.approx(2 / 4)}
    assert figures["pass_at_1"] == pytest.approx(5 / 8)
    # 3 of 4 and 2 of 4 right: every pair of the first has a right one, of the second all pairs but one of six.
    assert figures["pass_at_2"] == pytest.approx((1 + 5 / 6) / 2)
    assert figures["pass_at_4"] == pytest.approx(1.0)
    assert json.loads(json.dumps(figures)) == figures


@pytest.mark.parametrize("right", [[1, 0, 0, 0, 0], [1, 1, 0, 1, 0], [0] * 5, [1] * 5])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(right: list[int], k: int) -> None:
    made = tuple(Rollout(0, sample, 0, (1,), (2,), (0.0,), "", True) for sample in range(5))
    measured = Measured(made, (None,) * 5, {"correct": torch.tensor(right).float()})
    subsets = list(combinations(right, k))
    assert pass_at(measured, k) == pytest.approx(sum(any(each) for each in subsets) / len(subsets))


def test_an_end_token_of_another_name_is_no_part_of_the_answer(model_dir: Path, data: Path) -> None:
    """Chat models end in one of several special tokens; the sampler's text leaves out only the first of them."""
    task = opened(model_dir, data)
    other = task.tokenizer.fast.convert_tokens_to_ids("<|endoftext|>")
    assert other != task.tokenizer.end_id
    text = "<think>a</think>\\boxed{0.5}"
    ids = (*task.tokenizer.encode(text), other)
    rollout = Rollout(0, 0, 0, task.prompt_ids(0), ids, (0.0,) * len(ids), text + "<|endoftext|>", True)
    assert task.measure([rollout]).texts == ("0.5",)


def test_a_prompt_that_opens_the_block_changes_the_format(model_dir: Path, data: Path) -> None:
    task = opened(model_dir, data, prompt={"prefill": "<think>\n"})
    assert isinstance(task, MathTask) and task.tags.opened
    cases = [(0, "a</think>\\boxed{0.5}", True), (0, "<think>a</think>\\boxed{0.5}", True)]
    assert task.measure(rollouts(task, cases)).texts == ("0.5", None)
    assert isinstance(plain := opened(model_dir, data), MathTask) and not plain.tags.opened


def test_a_curriculum_reaches_the_requests(model_dir: Path) -> None:
    sources = {
        "easy": {"provider": "generated", "options": {"size": 50, "levels": [1]}},
        "hard": {"provider": "generated", "options": {"size": 50, "levels": [3]}, "weight": 0},
    }
    task = opened(model_dir, sources=sources, stages=[{"from_step": 2, "weights": {"hard": 1}}])
    assert isinstance(task, MathTask) and task.rows == 100
    for step, level in ((1, "1"), (2, "3")):
        asked = task.requests(list(range(8)), 0, step)
        assert {task.problems.problem(each.row).level for each in asked} == {level}
        assert all(each.prompt_ids == task.prompt_ids(each.row) for each in asked)
    figures = task.figures(task.measure(rollouts(task, [(0, "a", True), (60, "b", True)], 1)))
    assert figures["accuracy_by_source"] == {"easy": 0.0, "hard": 0.0}


def test_held_out_rows_are_a_file_or_a_source_of_their_own_or_none(model_dir: Path, data: Path) -> None:
    config = TaskConfig("math", {"provider": "hendrycks_math"})
    assert open_task(config, Data(str(data), training=False), str(model_dir), 0) is None
    assert opened(model_dir, Data("elsewhere", str(data), False)).rows == 2
    own = {"provider": "generated", "options": {"size": 7, "start": 1000}}
    assert opened(model_dir, Data("elsewhere", "", False), held_out=own).rows == 7
    hub_for_training = {"hub": "openai/gsm8k"}
    assert opened(model_dir, Data("", str(data), False), provider_options=hub_for_training).rows == 2


def test_the_shipped_configuration_makes_a_task(model_dir: Path, tmp_path: Path) -> None:
    generated = ["task.options.provider=generated", "task.options.provider_options={size: 9}"]
    config = compose("rl", [f"out={tmp_path}", "task=math", f"model={model_dir}", *generated])
    task = open_task(config.task, Data(config.data), config.model, config.seed)
    assert task is not None and task.rows == 9
    assert "\\boxed{}" in task.tokenizer.decode(task.prompt_ids(0))


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        (ConfigError, {"providr": "gsm8k"}, "task.options.providr"),
        (ConfigError, {"provider": "nothing"}, "'nothing'"),
        (ConfigError, {"answers": "kind"}, "answers='kind'"),
        (ConfigError, {"think_open": ""}, "think_open=''"),
        (ConfigError, {"think_open": "<t>", "think_close": "<t>"}, "think_close='<t>'"),
        (ConfigError, {"stages": [{"from_step": 1, "weights": {}}]}, "stages"),
        (ConfigError, {"sources": {"a": "gsm8k"}}, "'gsm8k'"),
        (ConfigError, {"sources": {"a": {"provider": "generated", "wieght": 1}}}, "sources.a.wieght"),
        (ConfigError, {"prompt": {"template": "no place"}}, "template='no place'"),
        (ConfigError, {"prompt": {"colour": "red"}}, "prompt.colour"),
        (MissingFile, {"provider": "gsm8k", "provider_options": {"path": "/nowhere.jsonl"}}, "/nowhere.jsonl"),
        (ColumnError, {"provider": "gsm8k"}, "no column 'question'"),
    ],
)
def test_options_that_make_no_sense_are_named(
    model_dir: Path, data: Path, kind: type[Exception], options: dict[str, Any], named: str
) -> None:
    with pytest.raises(kind) as caught:
        opened(model_dir, data, **options)
    assert type(caught.value) is kind and named in caught.value.found  # type: ignore[attr-defined]


def test_a_prompt_that_leaves_no_room_is_named_with_its_row(model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    rows = [{"question": "one " * count, "answer": "#### 1"} for count in (3, 200, 5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = opened(model_dir, path, provider="gsm8k")
    longest = len(task.prompt_ids(1))
    task.check_length(50, longest + 50)
    with pytest.raises(LayoutError, match=rf"{longest} tokens \(row 1\)"):
        task.check_length(51, longest + 50)


def test_a_model_without_a_tokenizer_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="tokenizer"):
        opened(tmp_path, data)


def test_messages_are_given_to_the_chat_template_as_they_are(directory: Path, tmp_path: Path) -> None:
    turns = [("system", "Be brief."), ("user", "Hello."), ("assistant", "Hi."), ("user", "2+2?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": messages, "answer": "4"}) + "\n")
    options = {"provider": "table", "provider_options": {"question_column": "prompt"}}
    task = opened(directory, path, prompt={"template": "{prompt} Box it.", "system": "Not this."}, **options)
    expected = task.tokenizer.fast.apply_chat_template(
        [*messages[:-1], {"role": "user", "content": "2+2? Box it."}], add_generation_prompt=True, return_dict=False
    )
    assert list(task.prompt_ids(0)) == list(expected)
    found = task.example(task.measure(rollouts(task, [(0, "\\boxed{4}", True)])), 0)
    assert (found["prompt"], found["file"], found["line"]) == ("2+2?", str(path), 1)
    assert found["before"] == [list(turn) for turn in turns[:-1]]
    with pytest.raises(ConfigError, match="plain text"):
        opened(directory, path, prompt={"chat": False}, **options)
