"""`rl task=sae` as a user types it: what a run leaves behind, and the same rollouts on every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nla_megatron.models.strength_files import read_predictor
from tests.support.planted import LOWERS, RAISES, plant, write_prompts
from tests.support.ranks import command
from tests.support.tiny import tiny_model

pytestmark = pytest.mark.slow

LAYOUTS = {"single": [], "tp2": ["parallel=tp2", "rollout=tp2"], "pp2": ["parallel=pp2"], "dp2": ["parallel=dp2"]}
COMPARED = (
    "reward", "policy_loss", "kl", "entropy", "policy_grad_norm", "strength_mean", "strength_std", "strength_min",
    "strength_max", "steered_tokens",
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("sae")
    tiny_model(base / "model")
    plant(base / "model", base / "sae")
    write_prompts(base / "prompts.jsonl")
    sae, fading = base / "sae", "{over: decode, kind: linear, end: 0.5, steps: 6}"
    places = (
        f"[{{layer: 3, where: all, sae: {sae}, features: [{RAISES}, {LOWERS}]}}, "
        f"{{layer: 1, mode: global, sae: {sae}, schedule: {fading}}}]"
    )
    for name, layout in LAYOUTS.items():
        source = "rollout.record=true" if name == "single" else f"rollout.replay={base / 'single'}"
        done = command(
            "rl", "task=sae", f"out={base / name}", f"model={base / 'model'}", f"data={base / 'prompts.jsonl'}",
            f"task.options.interventions={places}", "task.options.predictor.hidden=32",
            "task.options.predictor.initial_strength=1", "task.options.prompts.options={held_out_fraction: 0.2}",
            "~reward.terms.reconstruction", "+reward.terms.planted.term=tests.support.planted:share_of_class",
            "steps=3", "batch_size=4", "samples_per_prompt=4", "micro_batch_size=4", "rollout.max_new_tokens=10",
            "optim.lr=3e-3", "optim.warmup_steps=0", "algorithm.kl_coef=0.05", "algorithm.minibatches=2",
            "rollout.max_logprob_gap=1e-3", "eval_every=3", "eval_rows=4", "save_every=3", source, *layout,
        )  # fmt: skip
        assert done.returncode == 0, f"{name}\n{done.stdout[-2000:]}{done.stderr[-6000:]}"
    return {name: base / name for name in LAYOUTS}


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "single"])
def test_layout_gives_the_numbers_of_a_single_process(runs: dict[str, Path], layout: str) -> None:
    for alone, spread in zip(metrics(runs["single"]), metrics(runs[layout]), strict=True):
        for key in COMPARED:
            assert spread[key] == pytest.approx(alone[key], rel=2e-4, abs=2e-5), key


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sampler_and_trainer_steer_alike_at_every_token(runs: dict[str, Path], layout: str) -> None:
    for step in metrics(runs[layout]):
        assert step["logprob_gap_max"] <= 1e-4 and step["steering_failed"] == 0
        assert step["injected"] == step["expected_injections"] == 16


def test_a_run_leaves_predictor_comparison_and_checkpoint_and_no_model(runs: dict[str, Path]) -> None:
    run = runs["single"]
    predictor, described = read_predictor(run / "predictor")
    assert predictor.strengths == 3 and [each.mode for each in described.interventions] == ["features", "global"]
    comparison = json.loads((run / "steering" / "step_00000003.json").read_text())
    assert comparison["numbers"]["eval_reward_gain"] == metrics(run)[-1]["eval_reward_gain"]
    assert (run / "checkpoints" / "step_00000003" / "predictor").is_dir() and not (run / "hf").exists()


def test_target_strengths_are_fitted_without_a_sampler_and_alike_on_two_ranks(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    base = runs["single"].parent
    rows = [{"prompt": f"The {number}", "target_strengths": [number / 3 - 1]} for number in range(8)]
    (tmp_path / "targets.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, layout in (("one", []), ("two", ["parallel=pp2"])):
        done = command(
            "rl", "task=sae", f"out={tmp_path / name}", f"model={base / 'model'}", f"data={tmp_path / 'targets.jsonl'}",
            f"held_out={tmp_path / 'targets.jsonl'}", "task.options.objective=mse", "task.options.predictor.hidden=32",
            f"task.options.interventions=[{{layer: 3, mode: global, sae: {base / 'sae'}}}]", "steps=40",
            "task.options.predictor.dropout=0", "eval_every=40", "batch_size=8", "optim.lr=1e-3",
            "optim.warmup_steps=0", *layout,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert one[-1]["loss"] < 0.5 * one[0]["loss"] and one[-1]["eval_mse"] < 0.5 * one[0]["loss"]
    for alone, spread in zip(one, two, strict=True):
        assert spread["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    assert read_predictor(tmp_path / "two" / "predictor")[0].strengths == 1
