"""`rl task=sae` and `eval task=sae` as a user types them: what a run leaves behind, the same rollouts on every layout,
and what an evaluation says of the run's predictor.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nla_megatron.models.strength_files import read_predictor
from tests.support.planted import IDLE, LOWERS, RAISES, plant, silence, write_prompts
from tests.support.ranks import command
from tests.support.tiny import tiny_model

pytestmark = pytest.mark.slow

LAYOUTS = {"single": [], "tp2": ["parallel=tp2", "rollout=tp2"], "pp2": ["parallel=pp2"], "dp2": ["parallel=dp2"]}
REWARD = "+reward.terms.planted.term=tests.support.planted:share_of_class"
COMPARED = (
    "reward", "policy_loss", "kl", "entropy", "policy_grad_norm", "strength_mean", "strength_std", "strength_min",
    "strength_max", "steered_tokens",
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("sae")
    tiny_model(base / "model")
    plant(base / "model", base / "sae")
    write_prompts(base / "all.jsonl")
    lines = (base / "all.jsonl").read_text().splitlines()
    (base / "held_out.jsonl").write_text("\n".join(lines[::5]))
    (base / "prompts.jsonl").write_text("\n".join(line for line in lines if line not in lines[::5]))
    for name, layout in LAYOUTS.items():
        source = "rollout.record=true" if name == "single" else f"rollout.replay={base / 'single'}"
        train(base, base / name, source, *layout)
    return {name: base / name for name in LAYOUTS}


def train(base: Path, out: Path, *overrides: str) -> None:
    """Three steps of `rl` on two interventions, one of them fading over a response."""
    sae, fading = base / "sae", "{over: decode, kind: linear, end: 0.5, steps: 6}"
    places = (
        f"[{{layer: 3, where: all, sae: {sae}, features: [{RAISES}, {LOWERS}]}}, "
        f"{{layer: 1, mode: global, sae: {sae}, schedule: {fading}}}]"
    )
    done = command(
        "rl", "task=sae", f"out={out}", f"model={base / 'model'}", f"data={base / 'prompts.jsonl'}",
        f"task.options.interventions={places}", "task.options.predictor.hidden=32",
        "task.options.predictor.initial_strength=1", f"held_out={base / 'held_out.jsonl'}",
        # From the first epoch on it counts threefold, whose length an evaluation has to know.
        "~reward.terms.reconstruction", REWARD, "+reward.terms.planted.later_weight=3",
        "+reward.terms.planted.change_at=0", "+reward.terms.planted.change_by=epoch",
        "steps=3", "batch_size=4", "samples_per_prompt=4", "micro_batch_size=4", "rollout.max_new_tokens=10",
        "optim.lr=3e-3", "optim.warmup_steps=0", "algorithm.kl_coef=0.05", "algorithm.minibatches=2",
        "rollout.max_logprob_gap=1e-3", "eval_every=3", "eval_rows=4", "save_every=3", *overrides,
    )  # fmt: skip
    assert done.returncode == 0, f"{out}\n{done.stdout[-2000:]}{done.stderr[-6000:]}"


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


def test_a_predictor_is_exported_from_a_checkpoint(runs: dict[str, Path], tmp_path: Path) -> None:
    run = runs["single"]
    done = command("export", f"checkpoint={run / 'checkpoints' / 'step_00000003'}", f"out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    (found, told), (expected, own) = (read_predictor(folder / "predictor") for folder in (tmp_path / "out", run))
    assert told == own
    for name, tensor in expected.state_dict().items():
        assert tensor.equal(found.state_dict()[name]), name


def test_without_vllm_the_model_steers_what_it_writes_itself(runs: dict[str, Path], tmp_path: Path) -> None:
    train(runs["single"].parent, tmp_path / "own", "rollout.engine=policy", "parallel=tp2")
    for step in metrics(tmp_path / "own"):
        assert step["logprob_gap_max"] <= 1e-5 and step["steering_failed"] == 0 and step["policy_grad_norm"] > 0
    own = json.loads((tmp_path / "own" / "steering" / "step_00000003.json").read_text())
    vllm = json.loads((runs["single"] / "steering" / "step_00000003.json").read_text())
    assert own["rows"] == vllm["rows"] and own["numbers"]["eval_steered_tokens"] > 0
    assert own["steered"]["texts"] != own["plain"]["texts"]


def evaluated(out: Path, base: Path, *overrides: str) -> dict[str, Any]:
    """What `eval` says of the held-out prompts, sampled as the run samples."""
    done = command(
        "eval", "task=sae", f"out={out}", f"model={base / 'model'}", f"data={base / 'held_out.jsonl'}", REWARD,
        "rollout.max_new_tokens=10", "rollout.temperature=1", *overrides,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    found: dict[str, Any] = json.loads((out / "eval.json").read_text())
    return found


def test_an_evaluation_of_the_predictor_is_the_runs_own_last_one(runs: dict[str, Path], tmp_path: Path) -> None:
    run, out = runs["single"], tmp_path / "compared"
    words = ("rows=4", "examples=3", "rollout.max_new_tokens=10", "rollout.temperature=1")
    done = command("compare", f"root={run}", f"out={out}", *(f"eval.{word}" for word in words))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    [folder] = out.glob("evaluations/*/*")
    own = json.loads((run / "steering" / "step_00000003.json").read_text())
    found, rows = (json.loads((folder / name).read_text()) for name in ("eval.json", "rows.json"))
    assert (rows["rows"], rows["samples"]) == (own["rows"], own["samples"])
    assert rows["reward"] == own["steered"]["rewards"] and rows["reward_plain"] == own["plain"]["rewards"]
    for name in set(own["numbers"]) - {"eval_reward_gain_error"}:
        assert found[name.removeprefix("eval_")] == pytest.approx(own["numbers"][name], rel=1e-6), name
    for name, values in own["strengths"].items():
        assert found["strengths"][name] == pytest.approx(values, rel=1e-4, abs=1e-5)
    assert found["reward_gain_ci95"][0] <= found["reward_gain"] <= found["reward_gain_ci95"][1]
    examples = [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]
    assert [each["response"] for each in examples] == own["steered"]["texts"][:3]
    assert [each["response_plain"] for each in examples] == own["plain"]["texts"][:3]
    assert (folder / "report.html").read_text().count("<article>") == 3
    results = json.loads((out / "results.json").read_text())
    assert (results["metric"], results["groups"][0]["mean"]) == ("reward_gain", found["reward_gain"])


def test_steering_at_the_values_that_features_have_anyway_changes_nothing(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    """What the SAE does not explain stays: `global` at 1 adds 0 to the stream, as does a silent feature at 0."""
    base = runs["single"].parent
    silence(base / "sae", tmp_path / "silent", IDLE)
    places = (
        f"[{{layer: 1, mode: global, where: all, sae: {base / 'sae'}}}, "
        f"{{layer: 3, where: all, sae: {tmp_path / 'silent'}, features: [{IDLE}]}}]"
    )
    steered = (f"task.options.interventions={places}", "samples=2")
    found = evaluated(tmp_path / "eval", base, *steered, "task.options.fixed_strengths=[1, 0]")
    assert found["reward_gain"] == found["richness_gain"] == 0 and found["reward_gain_ci95"] == [0, 0]
    assert found["rows"] == 12 and found["steered_tokens"] > 0 and found["reward_ci95"][0] < found["reward_ci95"][1]
    for line in (tmp_path / "eval" / "examples.jsonl").read_text().splitlines():
        example = json.loads(line)
        assert example["response"] == example["response_plain"]


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
