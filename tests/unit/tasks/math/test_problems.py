"""Providers: what they read, what they leave out and count, and what they refuse."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nla_megatron.errors import ColumnError, ConfigError, MissingFile, NlaError
from nla_megatron.tasks.math.problems import Problem, make_provider, register

GSM8K = [
    {"question": "Two and two?", "answer": "2+2=<<2+2=4>>4\n#### 4"},
    {"question": "A thousand and one?", "answer": "#### 1,001"},
    {"question": "Unanswered?", "answer": "I do not know."},
    {"question": "Blank?", "answer": "####  "},
    {"question": "Null?", "answer": None},
]
MATH = [
    {"problem": "a", "solution": "$\\boxed{\\frac{1}{2}}$", "level": "Level 1", "type": "Algebra"},
    {"problem": "b", "solution": "\\boxed{x^2}", "level": "Level 5", "type": "Counting & Probability"},
    {"problem": "c", "solution": "no box", "level": "Level 5", "type": "Algebra"},
    {"problem": "d", "solution": "\\boxed{3}, no, \\boxed{(1,2)}", "level": "Level 3", "type": "Algebra"},
    {"problem": "e", "solution": "\\boxed{7}", "level": "Level ?", "type": "Geometry"},
]


def json_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refusal(kind: type[NlaError], name: str, **options: Any) -> NlaError:
    with pytest.raises(kind) as caught:
        make_provider(name, options)
    assert type(caught.value) is kind
    return caught.value


def problems(name: str, **options: Any) -> list[Problem]:
    provider = make_provider(name, options)
    return [provider.problem(index) for index in range(len(provider))]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "json", "directory"])
def test_gsm8k_is_read_from_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    if kind == "parquet":
        path = tmp_path / "train.parquet"
        pq.write_table(pa.Table.from_pylist(GSM8K), path)
    elif kind == "json":
        path = tmp_path / "train.json"
        path.write_text(json.dumps(GSM8K))
    else:
        path = json_lines(tmp_path / "train.jsonl", GSM8K)
    provider = make_provider("gsm8k", {"path": str(tmp_path if kind == "directory" else path)})
    found = [provider.problem(index) for index in range(len(provider))]
    assert found == [Problem("Two and two?", "4"), Problem("A thousand and one?", "1,001")]
    assert provider.unreadable == 3


def test_math_is_read_by_level_and_subject(tmp_path: Path) -> None:
    path = str(json_lines(tmp_path / "math.jsonl", MATH))
    everything = make_provider("hendrycks_math", {"path": path})
    references = [everything.problem(index).reference for index in range(len(everything))]
    assert references == ["\\frac{1}{2}", "x^2", "(1,2)", "7"] and everything.unreadable == 1
    assert [each.question for each in problems("hendrycks_math", path=path, levels=[3, 5])] == ["b", "d"]
    assert [each.question for each in problems("hendrycks_math", path=path, subjects=["algebra"])] == ["a", "d"]
    assert [each.question for each in problems("hendrycks_math", path=path, subjects=["counting_&_probability"])] == [
        "b"
    ]
    one = problems("hendrycks_math", path=path, levels=[1])[0]
    assert one == Problem("a", "\\frac{1}{2}", "Level 1", "Algebra")


def test_the_directory_of_the_original_math_is_one_object_in_each_file(tmp_path: Path) -> None:
    for index, row in enumerate(MATH):
        folder = tmp_path / str(row["type"]).replace(" ", "_")
        folder.mkdir(exist_ok=True)
        (folder / f"{index}.json").write_text(json.dumps(row))
    assert sorted(each.question for each in problems("hendrycks_math", path=str(tmp_path))) == ["a", "b", "d", "e"]


def test_a_table_of_bare_answers_may_name_its_columns(tmp_path: Path) -> None:
    path = str(json_lines(tmp_path / "aime.jsonl", [{"Problem": "a", "Answer": 204}, {"Problem": "b", "Answer": None}]))
    provider = make_provider("table", {"path": path, "question_column": "Problem", "answer_column": "Answer"})
    assert (len(provider), provider.unreadable) == (1, 1)
    assert provider.problem(0) == Problem("a", "204")


def test_a_limit_takes_the_first_rows(tmp_path: Path) -> None:
    path = str(json_lines(tmp_path / "train.jsonl", GSM8K))
    assert len(make_provider("gsm8k", {"path": path, "limit": 1})) == 1
    assert "limit=0" in refusal(ConfigError, "gsm8k", path=path, limit=0).found


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere.jsonl")
    assert nowhere in refusal(MissingFile, "gsm8k", path=nowhere).found
    (tmp_path / "empty").mkdir()
    assert "empty" in refusal(MissingFile, "gsm8k", path=str(tmp_path / "empty")).found
    other = str(json_lines(tmp_path / "other.jsonl", [{"question": "a", "solution": "b"}]))
    assert "no column 'answer'" in refusal(ColumnError, "gsm8k", path=other).found
    parquet = tmp_path / "other.parquet"
    pq.write_table(pa.table({"question": ["a"]}), parquet)
    assert "no column 'answer'" in refusal(ColumnError, "gsm8k", path=str(parquet)).found
    torn = tmp_path / "torn.jsonl"
    torn.write_text('{"question": "a", "answer": "#### 1"}\n{"question": "b", "ans')
    assert "line 2" in refusal(ColumnError, "gsm8k", path=str(torn)).found
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(b"PAR1 and then nothing")
    assert "cut.parquet" in refusal(ColumnError, "gsm8k", path=str(cut)).found
    text = tmp_path / "data.csv"
    text.write_text("question,answer\n")
    assert ".jsonl" in refusal(ColumnError, "gsm8k", path=str(text)).expected


def test_a_file_without_any_readable_reference_is_refused_with_their_number(tmp_path: Path) -> None:
    path = str(json_lines(tmp_path / "bad.jsonl", GSM8K[2:]))
    error = refusal(ColumnError, "gsm8k", path=path)
    assert "3 problems" in error.found and "####" in error.expected
    path = str(json_lines(tmp_path / "math.jsonl", MATH))
    assert "levels [2]" in refusal(ColumnError, "hendrycks_math", path=path, levels=[2]).expected


def test_exactly_one_of_path_and_hub(tmp_path: Path) -> None:
    assert "exactly one" in refusal(ConfigError, "gsm8k").expected
    assert "exactly one" in refusal(ConfigError, "gsm8k", path="a", hub="b/c").expected


def test_unknown_names_options_and_types_are_named() -> None:
    error = refusal(ConfigError, "gsm9k")
    assert "'gsm9k'" in error.found and "gsm8k" in error.expected and "generated" in error.expected
    assert refusal(ConfigError, "generated", sizes=3).remedy == "did you mean size?"
    assert ".size: Value 'many'" in refusal(ConfigError, "generated", size="many").found
    assert "levels=[9]" in refusal(ConfigError, "hendrycks_math", path="x", levels=[9]).found


@dataclass
class Doubles:
    """A provider of somebody else's."""

    size: int = 3
    unreadable: int = field(init=False, default=0)

    def __len__(self) -> int:
        return self.size

    def problem(self, index: int) -> Problem:
        return Problem(f"Twice {index}?", str(2 * index))


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_problems.py").write_text(
        "from dataclasses import dataclass\nfrom nla_megatron.tasks.math.problems import Problem\n\n@dataclass\n"
        "class Doubles:\n    size: int = 3\n    unreadable = 0\n    def __len__(self): return self.size\n"
        "    def problem(self, index): return Problem(f'Twice {index}?', str(2 * index))\n\nclass NoProvider: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "my_problems"


def test_a_class_by_import_path_is_a_provider(plugin: str) -> None:
    assert problems(f"{plugin}:Doubles", size=2) == [Problem("Twice 0?", "0"), Problem("Twice 1?", "2")]


def test_an_import_path_that_does_not_resolve_is_named(plugin: str) -> None:
    assert "no_such_module" in refusal(ConfigError, "no_such_module:Doubles").found
    assert "no Triples" in refusal(ConfigError, f"{plugin}:Triples").found
    assert "problem(index)" in refusal(ConfigError, f"{plugin}:NoProvider").expected
    assert ".colour" in refusal(ConfigError, f"{plugin}:Doubles", colour="red").found


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ConfigError, match="'gsm8k'"):
        register("gsm8k")(Doubles)


def test_a_data_set_of_the_hub_that_cannot_be_fetched_is_named(tmp_path: Path) -> None:
    """In a process of its own, because the library reads its switch when it is imported."""
    code = (
        "from nla_megatron.tasks.math.problems import make_provider\nfrom nla_megatron.errors import NlaError\n"
        "try: make_provider('gsm8k', {'hub': 'openai/gsm8k', 'subset': 'main'})\nexcept NlaError as e: print(repr(e))"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("MissingFile('the data set openai/gsm8k cannot be fetched"), done.stdout + done.stderr


def test_a_name_that_the_hub_cannot_have_is_named() -> None:
    assert "hub='a b/c'" in refusal(ConfigError, "gsm8k", hub="a b/c").found


def test_a_data_set_in_the_hubs_cache_is_read_without_a_network(tmp_path: Path) -> None:
    revision = "0" * 40
    repository = tmp_path / "hub" / "datasets--openai--gsm8k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    for subset, rows in (("main", GSM8K[:2]), ("socratic", GSM8K[1:2])):
        folder = repository / "snapshots" / revision / subset
        folder.mkdir(parents=True)
        for split, part in (("train", rows), ("test", rows[:1])):
            pq.write_table(pa.Table.from_pylist(part), folder / f"{split}-00000-of-00001.parquet")
    code = (
        "from nla_megatron.tasks.math.problems import make_provider as m\n"
        "for split, subset in (('train', 'main'), ('test', 'main'), ('train', 'socratic')):\n"
        "    print(len(m('gsm8k', {'hub': 'openai/gsm8k', 'subset': subset, 'split': split})))"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["2", "1", "1"], done.stdout + done.stderr


MESSAGES = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "What is 2 plus 2?"},
]  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_question_may_be_messages_and_a_reference_a_mapping_with_the_truth(tmp_path: Path, kind: str) -> None:
    rows = [
        {"prompt": turns, "reward_model": {"style": "rule", "ground_truth": truth}, "answer": truth}
        for turns, truth in ((MESSAGES[-1:], "4"), (MESSAGES, "4"), (MESSAGES[1:], None))
    ]
    path = tmp_path / f"train.{kind}"
    if kind == "jsonl":
        json_lines(path, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    for name in ("table", "gsm8k"):
        options = {"path": str(path), "question_column": "prompt", "answer_column": "reward_model"}
        provider = make_provider(name, options)
        found = [provider.problem(index) for index in range(len(provider))]
        before = tuple((turn["role"], turn["content"]) for turn in MESSAGES[:-1])
        assert found == [Problem("What is 2 plus 2?", "4"), Problem("What is 2 plus 2?", "4", before=before)]
        assert provider.unreadable == 1, "a null truth is no reference"
        place = {"line": 2} if kind == "jsonl" else {"file_row": 1}
        assert found[1].place == {"file": str(path), **place}


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"question": None}, "'question' in line 2 of .* is null"),
        ({"question": ""}, "'question' in line 2 of .* is ''"),
        ({"question": 5}, "'question' in line 2 of .* is 5"),
        ({"question": {"role": "user"}}, "'question' in line 2"),
        ({"question": "a \ud83d"}, "surrogate"),
        ({"question": []}, "messages of nobody"),
        ({"question": ["a"]}, "message 0 is no object but 'a'"),
        ({"question": [MESSAGES[2]]}, "messages of assistant"),
        ({"question": [MESSAGES[1], MESSAGES[0], MESSAGES[1]]}, "messages of user, system, user"),
        ({"question": [{"role": "tool", "content": "a"}]}, "the role 'tool'"),
        ({"question": [{"role": "user", "content": None}]}, "'content' in line 2 of .*, message 0 is null"),
        ({"question": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "a key 'tool_calls'"),
        ({"answer": ["4"]}, "'answer' in line 2 of .* is \\['4'\\]"),
        ({"answer": {"style": "rule"}}, "'answer' in line 2 of .* is {'style'"),
        ({"answer": {"ground_truth": [4]}}, "'answer' in line 2"),
        ({"answer": True}, "is True"),
        ({"answer": float("nan")}, "is nan"),
    ],
)
def test_a_row_that_is_no_problem_is_named(tmp_path: Path, row: dict[str, Any], found: str) -> None:
    good = {"question": "1+1?", "answer": "2"}
    path = str(json_lines(tmp_path / "rows.jsonl", [good, good | row]))
    error = refusal(ColumnError, "table", path=path)
    assert re.search(found, error.found), error.found


def test_a_number_is_a_bare_answer_and_no_worked_one(tmp_path: Path) -> None:
    path = str(json_lines(tmp_path / "rows.jsonl", [{"question": "1+1?", "answer": 2}]))
    assert problems("table", path=path)[0].reference == "2"
    assert "'answer' in line 1" in refusal(ColumnError, "gsm8k", path=path).found


def test_levels_may_be_numbers_and_never_null(tmp_path: Path) -> None:
    path = str(json_lines(tmp_path / "math.jsonl", [MATH[0] | {"level": 3}, MATH[1]]))
    assert [each.level for each in problems("hendrycks_math", path=path)] == ["Level 3", "Level 5"]
    path = str(json_lines(tmp_path / "math.jsonl", [MATH[0] | {"level": None}]))
    assert "'level' in line 1" in refusal(ColumnError, "hendrycks_math", path=path).found
