"""The same rollouts give the same rewards, losses and weights on every layout, with vLLM live in each of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.support.ranks import command
from tests.support.recorded import record
from tests.support.spread import layouts_of

STEPS, PROMPTS, SAMPLES, SEED = 2, 3, 4, 5
LAYOUTS = {"single": [], **layouts_of("nla")}
COMPARED = (
    "reward",
    "batch_fve",
    "policy_loss",
    "kl",
    "entropy",
    "clipped",
    "ar_loss",
    "policy_grad_norm",
    "ar_grad_norm",
    "extraction_failed",
)


@pytest.fixture(scope="module")
def recorded(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rollouts with real explanations, other rows' texts among them, and one response without an explanation."""
    return record(
        tmp_path_factory.mktemp("recorded"), toy / "build" / "rl.parquet", toy / "sft_av" / "hf", STEPS, PROMPTS,
        SAMPLES, SEED,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(toy: Path, recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("layouts")
    for name, layout in LAYOUTS.items():
        done = command(
            "rl",
            f"out={base / name}",
            f"av={toy / 'sft_av' / 'hf'}",
            f"ar={toy / 'sft_ar' / 'hf'}",
            f"data={toy / 'build' / 'rl.parquet'}",
            f"rollout.replay={recorded}",
            f"seed={SEED}",
            f"steps={STEPS}",
            f"batch_size={PROMPTS}",
            f"samples_per_prompt={SAMPLES}",
            "micro_batch_size=2",
            "rollout.max_new_tokens=64",
            "rollout.cpu_kv_cache_gib=0.1",
            "optim.lr=1e-3",
            "optim.warmup_steps=0",
            "ar_optim.lr=1e-3",
            "ar_optim.warmup_steps=0",
            "ar_updates=2",
            "algorithm.minibatches=2",
            "algorithm.kl_coef=0.1",
            "rollout.max_logprob_gap=1e-3",
            *layout,
        )
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
def test_sampler_and_trainer_agree_at_every_token(runs: dict[str, Path], layout: str) -> None:
    for step in metrics(runs[layout]):
        assert step["logprob_gap_max"] <= 1e-3
        assert step["injected"] == step["expected_injections"] == PROMPTS * SAMPLES


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "single"])
@pytest.mark.parametrize("role", ["av", "ar"])
def test_layout_exports_the_weights_of_a_single_process(runs: dict[str, Path], layout: str, role: str) -> None:
    alone, spread = (load_file(runs[name] / role / "model.safetensors") for name in ("single", layout))
    assert set(alone) == set(spread)
    # Adam's first steps have the gradient's sign alone; a gradient that is rounding may go either way by a step's size.
    off = sum(int(((alone[name] - spread[name]).abs() > 1e-4).sum()) for name in alone)
    assert off <= 1e-3 * sum(tensor.numel() for tensor in alone.values())


def test_the_run_is_not_trivial(runs: dict[str, Path]) -> None:
    first, second = metrics(runs["single"])
    assert first["extraction_failed"] == pytest.approx(1 / (PROMPTS * SAMPLES))
    assert first["reward_std"] > 0 and first["policy_grad_norm"] > 0 and first["ar_grad_norm"] > 0
    assert second["kl"] > 0
