"""Adapters in place of whole weights, from the warm start to RL: what moves, what is written, what comes back."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nla_megatron.contract.sidecar import read_model_sidecar
from nla_megatron.conversion.hf import VALUE_HEAD
from nla_megatron.conversion.peft_format import CONFIG
from tests.support.quantized import dequantised
from tests.support.ranks import command
from tests.support.recorded import record
from tests.support.tiny import AR_TEMPLATE, tiny_model, tiny_rows, tiny_table

pytestmark = pytest.mark.slow

STEPS, PROMPTS, SAMPLES, SEED = 3, 3, 4, 5
TEMPLATE = "Explain <concept><INJECT></concept>"
LORA = ("lora.rank=4", "lora.alpha=8", "lora.rslora=true")
AR_LORA = ("ar_lora.rank=2", "ar_lora.targets=[q_proj,down_proj]")
FOUR_BITS = ("lora.quantize=nf4", "ar_lora.quantize=nf4")
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def weights(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def moved(after: dict[str, Tensor], before: dict[str, Tensor]) -> set[str]:
    """The kinds of weights that differ: the last but one part of their names."""
    return {name.split(".")[-2] for name in after if not torch.equal(after[name], before[name])}


def merged_by_peft(base: Path, adapter: Path) -> dict[str, Tensor]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapter))
    return dict(model.merge_and_unload().state_dict())


def sft_words(started: Path, out: Path, *more: str) -> tuple[str, ...]:
    build = started / "build"
    return (
        "sft", "role=both", f"model={started / 'base'}", f"data={build / 'av_sft.parquet'}",
        f"ar_data={build / 'ar_sft.parquet'}", f"out={out}", "steps=3", "batch_size=4", "optim.lr=1e-2",
        "ar_optim.lr=1e-2", "optim.warmup_steps=0", "parallel=tp2", *LORA, *AR_LORA, *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, tables, and a warm start of both models by adapters alone."""
    out = tmp_path_factory.mktemp("lora")
    base = tiny_model(out / "base", ffn_hidden_size=128)
    source = tiny_table(out / "explained.parquet", base, "explained", tiny_rows(64, 40, 3))
    for words in (
        ("build", f"input={source}", f"model={base}", f"out={out / 'build'}", "held_out=0.2",
         f"templates.av='{TEMPLATE}'", f"templates.ar='{AR_TEMPLATE}'"),
        sft_words(out, out / "sft"),
    ):  # fmt: skip
        done = command(*words)
        assert done.returncode == 0, done.stderr
    record(out / "recorded", out / "build" / "rl.parquet", out / "sft" / "av", STEPS, PROMPTS, SAMPLES, SEED)
    return out


def test_a_warm_start_moves_the_targets_alone_and_writes_what_peft_merges(started: Path) -> None:
    base, sft = started / "base", started / "sft"
    assert moved(weights(sft / "av"), weights(base)) == set(ADAPTED)
    ar = weights(sft / "ar")
    assert moved(ar, {name: weights(base)[name] for name in ar}) == {"q_proj", "down_proj"}
    [head] = load_file(sft / "ar" / VALUE_HEAD).values()
    assert not torch.equal(head, torch.eye(len(head)))

    merged = merged_by_peft(base, sft / "adapters" / "av")
    for name, tensor in weights(sft / "av").items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-6)
    assert not (sft / "adapters" / "ar").exists()
    assert read_model_sidecar(sft / "adapters" / "av") == read_model_sidecar(sft / "av")
    assert read_model_sidecar(sft / "av").training["lora"]["rank"] == 4


def test_a_checkpoint_holds_what_learns_alone(started: Path) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    newest = max((started / "sft" / "checkpoints").glob("step_*"))
    for role, heads in (("av", 0), ("ar", 1)):
        keys = FileSystemReader(newest / role).read_metadata().state_dict_metadata
        own = [key for key in keys if not key.startswith("optimizer.") and hasattr(keys[key], "chunks")]
        assert own and sum(".lora." not in key for key in own) == heads, own


def rl_words(started: Path, out: Path, *more: str, sft: str = "sft") -> tuple[str, ...]:
    return (
        "rl", f"rollout.replay={started / 'recorded'}", f"av={started / sft / 'av'}", f"ar={started / sft / 'ar'}",
        f"data={started / 'build' / 'rl.parquet'}", f"out={out}", f"steps={STEPS}", f"batch_size={PROMPTS}",
        f"samples_per_prompt={SAMPLES}", f"seed={SEED}", "save_every=1", "keep_checkpoints=3",
        f"held_out={started / 'build' / 'held_out.parquet'}", f"keep_every={STEPS}",
        "optim.lr=1e-2", "optim.warmup_steps=0", "rollout.max_logprob_gap=1e-3",
        "algorithm.kl=k3", "algorithm.kl_coef=0.1", "algorithm.reference=ema", "algorithm.reference_decay=0.5",
        "rollout.max_new_tokens=96", "rollout.max_model_len=256", "rollout.max_num_seqs=16",
        *LORA, *AR_LORA, *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def reinforced(started: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tensor-parallel, the adapters handed over as they are."""
    out = tmp_path_factory.mktemp("rl") / "adapters"
    done = command(*rl_words(started, out, "parallel=tp2"))
    assert done.returncode == 0, done.stderr
    return out


def check_alike(found: Path, expected: Path) -> None:
    for one, other in zip(metrics(found), metrics(expected), strict=True):
        for name in ("reward", "policy_loss", "kl", "entropy", "ar_loss", "policy_grad_norm", "ar_grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=2e-3, abs=1e-5), name


def test_rl_moves_adapters_and_compares_with_the_policy_without_them(started: Path, reinforced: Path) -> None:
    steps = metrics(reinforced)
    assert all(step["logprob_gap_max"] <= 2e-4 and step["injected"] == PROMPTS * SAMPLES for step in steps)
    # The policy starts as its own reference, and has left it one update later.
    assert steps[0]["kl"] == 0 and steps[1]["kl"] > 1e-6
    assert moved(weights(reinforced / "av"), weights(started / "sft" / "av")) == set(ADAPTED)
    assert moved(weights(reinforced / "ar"), weights(started / "sft" / "ar")) == {"q_proj", "down_proj"}
    adapter = json.loads((reinforced / "adapters" / "av" / CONFIG).read_text())
    assert adapter["base_model_name_or_path"] == str(started / "sft" / "av")


def test_adapters_alone_are_handed_over_as_merged_weights_are(started: Path, reinforced: Path, tmp_path: Path) -> None:
    """Which is how a run that says nothing does it."""
    done = command(*rl_words(started, tmp_path / "rl", "parallel=pp2", "rollout.lora=merged"))
    assert done.returncode == 0, done.stderr
    check_alike(tmp_path / "rl", reinforced)


def test_a_kept_checkpoint_is_evaluated_as_what_the_run_exported(reinforced: Path, tmp_path: Path) -> None:
    """Of the last step it is the same model; what it began with is found by the run's record."""
    words = ("checkpoints=permanent", "eval.rows=6", "eval.bootstrap=20", "eval.rollout.max_new_tokens=4")
    done = command("compare", f"root={reinforced}", f"out={tmp_path / 'out'}", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    [row] = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert (row["step"], row["injected"]) == (STEPS, row["expected_injections"])
    [models] = (tmp_path / "out" / "models").glob("*/*")
    for role in ("av", "ar"):
        found, expected = weights(models / role), weights(reinforced / role)
        assert found.keys() == expected.keys()
        for name in found:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-7)
        told, own = read_model_sidecar(models / role), read_model_sidecar(reinforced / role)
        assert replace(told, created_at="") == replace(own, created_at="")
    assert (models / "adapters" / "av" / CONFIG).is_file()


def check_resumed(run: Path, expected: Path, start: Path) -> None:
    """Of a run that lost its last two steps and took them again."""
    check_alike(run, expected)
    found, wanted, before = weights(run / "av"), weights(expected / "av"), weights(start)
    for name in found:
        # Adam divides by a gradient's own size, so where one is rounding alone, so is its direction.
        assert (found[name] - wanted[name]).norm() <= 0.02 * (wanted[name] - before[name]).norm() + 1e-6


def killed(run: Path, out: Path) -> Path:
    """A copy of a finished run as it was after its first step."""
    shutil.copytree(run, out)
    for left in ("done", "av", "ar", "adapters", "checkpoints/step_00000002", "checkpoints/permanent"):
        path = out / left
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return out


def test_a_killed_run_resumes_on_another_layout(started: Path, reinforced: Path, tmp_path: Path) -> None:
    run = killed(reinforced, tmp_path / "rl")
    done = command(*rl_words(started, run, "parallel=pp2"))
    assert done.returncode == 0, done.stderr
    check_resumed(run, reinforced, started / "sft" / "av")


@pytest.fixture(scope="module")
def packed(started: Path) -> Path:
    """A warm start of both models on 4-bit weights."""
    done = command(*sft_words(started, started / "packed", *FOUR_BITS))
    assert done.returncode == 0, done.stderr
    return started / "packed"


def check_written(run: Path, av: Path, ar: Path, scratch: Path) -> None:
    """What a run on 4-bit weights wrote: those of where it started, in four bits, and its adapters in them."""
    merged = merged_by_peft(dequantised(av, scratch / "av"), run / "adapters" / "av")
    for name, tensor in weights(run / "av").items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-6)
    assert moved(weights(run / "av"), weights(scratch / "av")) == set(ADAPTED)
    after, before = weights(run / "ar"), weights(dequantised(ar, scratch / "ar"))
    assert moved(after, {name: before[name] for name in after}) == {"q_proj", "down_proj"}


def test_a_warm_start_on_4_bit_weights_writes_them_with_the_adapters_in_them(
    started: Path, packed: Path, tmp_path: Path
) -> None:
    check_written(packed, started / "base", started / "base", tmp_path)
    training = read_model_sidecar(packed / "av").training
    assert (training["lora"]["rank"], training["lora"]["quantize"]) == (4, "nf4")
    # It is not the run on whole weights with another export.
    assert metrics(packed)[0]["av_loss"] != metrics(started / "sft")[0]["av_loss"]


def test_rl_on_4_bit_weights_samples_what_it_trains_and_resumes_on_another_layout(
    started: Path, packed: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    done = command(*rl_words(started, whole, "parallel=tp2", *FOUR_BITS, sft="packed"))
    assert done.returncode == 0, done.stderr
    steps = metrics(whole)
    assert all(step["logprob_gap_max"] <= 2e-4 and step["injected"] == PROMPTS * SAMPLES for step in steps)
    assert steps[0]["kl"] == 0 and steps[1]["kl"] > 1e-6
    check_written(whole, packed / "av", packed / "ar", tmp_path)
    run = killed(whole, tmp_path / "again")
    done = command(*rl_words(started, run, "parallel=pp2", *FOUR_BITS, sft="packed"))
    assert done.returncode == 0, done.stderr
    check_resumed(run, whole, packed / "av")
