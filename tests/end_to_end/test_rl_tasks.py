"""`rl` of tasks of a plain language model, as a user types it, with a tiny model: two steps, resumed, on layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from nla_megatron.errors import NlaError
from tests.support.ranks import command
from tests.support.spread import layouts_of
from tests.support.tiny import tiny_model

PROMPTS, SAMPLES = 2, 3
COMMON = (
    f"batch_size={PROMPTS}", f"samples_per_prompt={SAMPLES}", "micro_batch_size=3", "rollout.max_new_tokens=10",
    "rollout.cpu_kv_cache_gib=0.05", "rollout.temperature=0.9", "rollout.max_logprob_gap=1e-3", "optim.lr=1e-3",
    "optim.warmup_steps=0", "save_every=1", "eval_rows=4", "rollout.record=true",
)  # fmt: skip
LEXICAL = ("task=lexical", "reward=lexical", "eval_every=1")
MATH = (
    "task=math", "task.options.provider=generated", "task.options.held_out={options: {size: 9, start: 900}}",
    "reward=correctness", "eval_every=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"), max_positions=512)


def train(model: Path, out: Path, *overrides: str) -> None:
    done = command("rl", f"model={model}", f"out={out}", *COMMON, *overrides)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def metrics(run: Path) -> list[dict[str, Any]]:
    kept = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("seconds_")} for line in kept]


@pytest.fixture(scope="module")
def straight(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "rl"
    train(model, out, *LEXICAL, "steps=2")
    return out


def test_two_steps_reward_learn_evaluate_and_export(straight: Path, model: Path) -> None:
    first, second = metrics(straight)
    for step in (first, second):
        assert step["logprob_gap_max"] <= 1e-3, "sampler and trainer score at the same temperature"
        assert 0 < step["eval_richness"] <= 1 and isinstance(step["eval_reward"], float)
        assert isinstance(step["reward"], float) and step["response_length"] > 0
    before, after = (load_file(each / "model.safetensors") for each in (model, straight / "hf"))
    assert any(bool((before[name] != after[name]).any()) for name in before)


def test_generations_of_the_same_prompts_stand_side_by_side(straight: Path) -> None:
    pairs = [json.loads(line) for line in (straight / "before_after.jsonl").read_text().splitlines()]
    assert len(pairs) == 4
    for pair in pairs:
        assert pair["before"]["prompt"] == pair["after"]["prompt"] == pair["prompt"]
        assert pair["before"]["step"] < pair["after"]["step"] == 2


def test_every_token_of_a_response_is_trained_on_its_end_too(straight: Path) -> None:
    """A response that ends at once is its end token: were that left out of the loss, nothing of it would be."""
    for number, step in enumerate(metrics(straight)):
        lines = (straight / "rollouts" / f"step_{number:08d}.jsonl").read_text().splitlines()
        lengths = [len(json.loads(line)["response_ids"]) for line in lines]
        assert len(lengths) == PROMPTS * SAMPLES
        assert step["response_length"] == pytest.approx(sum(lengths) / len(lengths))


def test_a_resumed_run_ends_where_the_straight_one_does(model: Path, straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "rl"
    train(model, out, *LEXICAL, "steps=2")
    (out / "done").unlink()
    newest = max((out / "checkpoints").glob("step_????????"))
    for path in sorted(newest.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    newest.rmdir()
    train(model, out, *LEXICAL, "steps=2")
    assert metrics(out) == metrics(straight)
    resumed, whole = (load_file(each / "hf" / "model.safetensors") for each in (out, straight))
    assert all(bool((resumed[name] == whole[name]).all()) for name in whole)


@pytest.mark.parametrize("layout", layouts_of("lexical"))
def test_layouts_give_the_numbers_of_one_process(model: Path, straight: Path, tmp_path: Path, layout: str) -> None:
    out = tmp_path / "rl"
    train(
        model,
        out,
        *LEXICAL,
        "steps=2",
        f"rollout.replay={straight}",
        "rollout.record=false",
        *layouts_of("lexical")[layout],
    )
    for alone, spread in zip(metrics(straight), metrics(out), strict=True):
        assert spread["reward"] == pytest.approx(alone["reward"], rel=1e-5)
        assert spread["logprob_gap_max"] <= 1e-3


@pytest.fixture(scope="module")
def mathematics(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("math") / "rl"
    train(model, out, *MATH, "steps=2", "keep_every=1")
    return out


def test_math_counts_measures_and_evaluates(mathematics: Path) -> None:
    last = metrics(mathematics)[-1]
    for name in ("eval_accuracy", "eval_format_rate", "eval_thinking_tokens_mean", "eval_truncated"):
        assert isinstance(last[name], float), name


def test_every_checkpoint_of_a_run_is_evaluated_in_the_task_that_it_learned(mathematics: Path, tmp_path: Path) -> None:
    out = tmp_path / "compared"
    words = ("eval.rollout.max_new_tokens=10", "eval.rollout.cpu_kv_cache_gib=0.05", "eval.bootstrap=20")
    done = command("compare", f"root={mathematics}", f"out={out}", "checkpoints=all", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((out / "results.json").read_text())
    assert found["metric"] == "accuracy" and sorted(row["step"] for row in found["runs"]) == [1, 2]
    for row in found["runs"]:
        assert row["rows"] == 9, "the run's own held-out rows"
        assert all(
            isinstance(row[name], float) for name in ("thinking_tokens_mean", "format_rate", "accuracy_ci95_low")
        )
    assert "Thinking tokens, mean" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("overrides", "error", "named"),
    [
        ((*LEXICAL, "data=/nowhere.jsonl"), "MissingFile", "/nowhere.jsonl"),
        ((*LEXICAL, "task.options.held_out_fraction=0"), "ConfigError", "eval_every=1 without held-out rows"),
        ((*MATH, "task.options.provider=nothing"), "ConfigError", "'nothing'"),
        ((*MATH, "task.options.provider=no_such_module:P"), "ConfigError", "no_such_module"),
        (("task.name=poetry", "rollout.max_new_tokens=10"), "ConfigError", "'poetry'"),
        ((*LEXICAL, "rollout.max_new_tokens=512"), "LayoutError", "512"),
    ],
)
def test_mistakes_are_named_before_the_first_step(
    model: Path, tmp_path: Path, overrides: tuple[str, ...], error: str, named: str
) -> None:
    done = command("rl", f"model={model}", f"out={tmp_path / 'run'}", *COMMON, *overrides, timeout=120)
    assert done.returncode == NlaError.exit_code and f"{error}: " in done.stderr and named in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()
