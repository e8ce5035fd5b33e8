"""The task `lexical`: words by hand, prompts from every source, held-out ones apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nla_megatron.config.compose import compose
from nla_megatron.config.schema import TaskConfig
from nla_megatron.errors import ColumnError, ConfigError, MissingFile
from nla_megatron.tasks.lexical import LexicalTask, words
from nla_megatron.tasks.text import Data, open_task
from nla_megatron.types import Rollout


def opened(model: Path, data: Data | None = None, **options: Any) -> LexicalTask | None:
    task = open_task(TaskConfig("lexical", options), data or Data(), str(model), 0)
    assert task is None or isinstance(task, LexicalTask)
    return task


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The cat saw the CAT", ["the", "cat", "saw", "the", "cat"]),
        ("Stop, don't stop!", ["stop,", "don't", "stop!"]),
        ("Straße ÜBER été", ["straße", "über", "été"]),
        (" \n ", []),
        ("", []),
        ("a\nb\tA", ["a", "b", "a"]),
    ],
)
def test_words_stand_between_white_space_in_lower_case(text: str, found: list[str]) -> None:
    assert words(text) == found


def test_responses_are_measured_exactly(model_dir: Path) -> None:
    task = opened(model_dir)
    assert task is not None
    end = task.tokenizer.end_id
    texts = ["The cat saw the cat", "  ", "one two three", ""]
    rollouts = [
        Rollout(index, 0, index, (1,), (9, 9, end) if index != 2 else (9,), (0.0,) * 3, text, index != 2)
        for index, text in enumerate(texts)
    ]
    # What was sampled says what the text is, except that the end token is no part of it.
    rollouts = [
        Rollout(r.group, 0, r.row, (1,), (*task.tokenizer.encode(r.text), *((end,) if r.finished else ())), (), r.text,
                r.finished)
        for r in rollouts
    ]  # fmt: skip
    measured = task.measure(rollouts)
    assert measured.texts == ("The cat saw the cat", None, "one two three", None)
    assert measured.values["words"].tolist() == [5, 0, 3, 0]
    assert measured.values["unique_words"].tolist() == [3, 0, 3, 0]
    assert measured.values["words"].dtype == torch.float32
    figures = task.figures(measured)
    assert figures["richness"] == pytest.approx((3 / 5 + 0 + 1 + 0) / 4)
    assert (figures["words_mean"], figures["words_median"]) == (2.0, 1.5)
    assert figures["truncated"] == 0.25
    name, values = task.main(measured)
    assert name == "richness" and values.tolist() == pytest.approx([0.6, 0, 1, 0])
    example = task.example(measured, 0)
    assert (example["prompt"], example["response"], example["words"]) == (task.prompts[0], "The cat saw the cat", 5)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_prompts_come_from_a_file(model_dir: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"prompts.{kind}"
    prompts = ["Once upon", "In the", "A long"]
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"start": prompt}) + "\n" for prompt in prompts))
    else:
        pq.write_table(pa.table({"start": prompts}), path)
    task = opened(model_dir, Data(str(path), held_out="given"), prompt_column="start")
    assert task is not None and task.prompts == tuple(prompts)
    assert [task.text(row) for row in range(task.rows)] == prompts


def test_a_corpus_gives_the_beginnings_of_its_first_sentences(model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    texts = [
        "title\n*****\n\nThe first sentence of this one has many words. Another.",
        "no sentence here",
        "Is this a question about something? Yes.",
        "The first sentence of this one goes on in another way, as it does.",
    ]
    path.write_text("".join(json.dumps({"doc_id": str(i), "text": text}) + "\n" for i, text in enumerate(texts)))
    task = opened(model_dir, Data(str(path), held_out="given"), prompt_words=5)
    assert task is not None
    assert task.prompts == ("The first sentence of this", "Is this a question about"), "equal beginnings are one prompt"


def test_without_a_file_the_prompts_are_every_pythons(model_dir: Path) -> None:
    task, held_out = opened(model_dir), opened(model_dir, Data(training=False))
    assert task is not None and held_out is not None
    assert task.rows > 250 and held_out.rows > 20
    assert not set(task.prompts) & set(held_out.prompts)
    assert all(1 < len(prompt.split()) <= 8 and prompt[0].isupper() for prompt in task.prompts)
    everything = opened(model_dir, held_out_fraction=0.0)
    assert everything is not None and everything.rows == task.rows + held_out.rows
    assert opened(model_dir, Data(training=False), held_out_fraction=0.0) is None


def test_a_file_of_held_out_prompts_leaves_the_others_whole(model_dir: Path, tmp_path: Path) -> None:
    for name, prompts in (("train", [f"prompt number {n}" for n in range(50)]), ("test", ["Something else"])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": each}) + "\n" for each in prompts))
    train, test = str(tmp_path / "train.jsonl"), str(tmp_path / "test.jsonl")
    found = [opened(model_dir, data) for data in (Data(train, test), Data(train, test, False), Data(train))]
    assert [task.rows for task in found if task is not None][:2] == [50, 1]
    assert found[2] is not None and 30 < found[2].rows < 50, "a tenth is kept where no file is named"


@pytest.mark.parametrize(
    ("content", "kind", "named"),
    [
        ('{"text_": "a"}', ColumnError, "no column 'prompt'"),
        ('{"prompt": ""}', ColumnError, "line 1"),
        ('{"prompt": "a"}\n{"prompt": null}', ColumnError, "line 2"),
        ("", ColumnError, "no prompts"),
        ('["a"]', ColumnError, "no object"),
    ],
)
def test_files_that_hold_no_prompts_are_named(
    model_dir: Path, tmp_path: Path, content: str, kind: type[ColumnError], named: str
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(kind) as caught:
        opened(model_dir, Data(str(path), held_out="given"))
    assert named in caught.value.found


def test_a_missing_file_and_wrong_options_are_named(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"nowhere.jsonl[\s\S]*held_out="):
        opened(model_dir, Data(held_out=str(tmp_path / "nowhere.jsonl"), training=False))
    for options, named in (
        ({"prompt_words": 0}, "prompt_words=0"),
        ({"held_out_fraction": 1.0}, "held_out_fraction=1.0"),
        ({"prompt_wrods": 3}, "task.options.prompt_wrods"),
        ({"prompt_words": "three"}, "task.options.prompt_words: Value 'three'"),
    ):
        with pytest.raises(ConfigError) as caught:
            opened(model_dir, **options)
        assert named in caught.value.found


def test_the_shipped_configuration_makes_a_task(model_dir: Path, tmp_path: Path) -> None:
    config = compose("rl", [f"out={tmp_path}", "task=lexical", f"model={model_dir}"])
    assert open_task(config.task, Data(config.data), config.model, config.seed) is not None
