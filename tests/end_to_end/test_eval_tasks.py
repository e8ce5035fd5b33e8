"""`eval` of tasks of a plain language model, as a user types it, with a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nla_megatron.rewards.utilisation import read_zero_shot
from tests.support.ranks import command
from tests.support.tiny import tiny_model

pytestmark = pytest.mark.slow

ROWS, SAMPLES = 6, 2
SHORT = ("rollout.max_new_tokens=10", "rollout.cpu_kv_cache_gib=0.05")
MATH = ("task=math", "task.options.provider=generated", "task.options.held_out={options: {size: 40, start: 900}}")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"), max_positions=512)


@pytest.fixture(scope="module")
def runs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("eval")
    sampled = (f"rows={ROWS}", f"samples={SAMPLES}", "rollout.temperature=1.0", "examples=3", *SHORT)
    arguments = {
        "math": (*MATH, *sampled),
        "lexical": ("task=lexical", f"rows={ROWS}", *SHORT),
        "lexical_tp2": ("task=lexical", f"rows={ROWS}", *SHORT, "parallel=tp2", "rollout=tp2", "rollout.temperature=0"),
        "compared": (*MATH, *sampled, f"compare={base / 'math'}"),
    }
    for name, overrides in arguments.items():
        done = command("eval", f"model={model}", f"out={base / name}", *overrides)
        assert done.returncode == 0, f"{name}\n{done.stdout[-2000:]}{done.stderr[-6000:]}"
    return {name: base / name for name in arguments}


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_math_writes_its_figures_rows_and_examples(runs: dict[str, Path]) -> None:
    found, rows = read(runs["math"] / "eval.json"), read(runs["math"] / "rows.json")
    assert (found["task"], found["rows"], found["samples"], found["temperature"]) == ("math", ROWS, SAMPLES, 1.0)
    for name in ("accuracy", "format_rate", "thinking_tokens_mean", "thinking_tokens_median", "thinking_tokens_p90",
                 "truncated", "pass_at_1", "pass_at_2"):  # fmt: skip
        assert isinstance(found[name], float), name
    assert found["accuracy"] == pytest.approx(sum(rows["correct"]) / (ROWS * SAMPLES))
    assert found["accuracy_ci95"][0] <= found["accuracy"] <= found["accuracy_ci95"][1]
    assert len(rows["rows"]) == ROWS * SAMPLES and len(set(rows["rows"])) == ROWS
    examples = [json.loads(line) for line in (runs["math"] / "examples.jsonl").read_text().splitlines()]
    assert len(examples) == 3 and all(each["reference"].isdigit() and each["prompt"] for each in examples)
    by_row = {row: [] for row in rows["rows"]}
    for row, correct in zip(rows["rows"], rows["correct"], strict=True):
        by_row[row].append(correct)
    shares = read_zero_shot(str(runs["math"] / "correct.jsonl"))
    assert shares == {row: sum(values) / SAMPLES for row, values in by_row.items()}, "as the reward reads it"
    assert (runs["math"] / "done").is_file()


def test_the_page_shows_the_headline_and_the_examples(runs: dict[str, Path]) -> None:
    page = (runs["math"] / "report.html").read_text()
    examples = [json.loads(line) for line in (runs["math"] / "examples.jsonl").read_text().splitlines()]
    assert "Share of right answers" in page and "Tokens of thinking" in page
    assert page.count("<article>") == 3 and examples[0]["prompt"].split(".")[0] in page
    assert "http" not in page.replace("http-equiv", "")


def test_an_evaluation_of_the_same_rows_is_compared(runs: dict[str, Path]) -> None:
    found = read(runs["compared"] / "eval.json")
    assert found["accuracy_gain"] == 0.0 and found["accuracy_gain_ci95"] == [0.0, 0.0], "the same model and seeds"


def test_lexical_is_the_same_greedy_text_on_one_rank_and_on_two(runs: dict[str, Path]) -> None:
    alone, spread = (read(runs[name] / "rows.json") for name in ("lexical", "lexical_tp2"))
    assert alone == spread
    found = read(runs["lexical"] / "eval.json")
    assert 0 < found["richness"] <= 1 and found["words_mean"] > 0


@pytest.mark.parametrize(
    ("overrides", "error", "named"),
    [
        ((*MATH,), "ConfigError", "no model"),
        ((*MATH, "model=MODEL", "samples=2"), "ConfigError", "samples=2 with rollout.temperature=0"),
        (("task=math", "model=MODEL"), "ConfigError", "no rows to evaluate the task math on"),
        (("task=math", "model=MODEL", "data=/nowhere.jsonl"), "MissingFile", "/nowhere.jsonl"),
        ((*MATH, "model=MODEL", "rollout.max_new_tokens=500"), "LayoutError", "rollout.max_new_tokens=500"),
        ((*MATH, "model=MODEL", "compare=/nowhere"), "MissingFile", "/nowhere"),
        ((*MATH, "model=MODEL", "rows=1"), "ConfigError", "1 rows"),
        (("task=lexical", "model=MODEL", "rollout=tp2"), "LayoutError", "rollout.tp=2"),
        (("task.name=poetry", "model=MODEL"), "ConfigError", "'poetry'"),
        ((), "ConfigError", "no value for av, ar, data"),
        (("av=a", "ar=b", "data=c", "samples=2"), "ConfigError", "samples=2 in the task nla"),
    ],
)
def test_mistakes_are_named_before_anything_is_sampled(
    model: Path, tmp_path: Path, overrides: tuple[str, ...], error: str, named: str
) -> None:
    chosen = [each.replace("MODEL", str(model)) for each in overrides]
    done = command("eval", f"out={tmp_path / 'run'}", *chosen, timeout=120)
    assert done.returncode == 2 and f"{error}: " in done.stderr and named in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()
