"""A sweep of `rl` and what becomes of it: jobs at once, checkpoints that stay, each of them evaluated, one page."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from nla_megatron.contract.sidecar import read_model_sidecar
from tests.support.ranks import command, command_line, start

pytestmark = pytest.mark.slow
EVAL = (
    "eval.rows=16",
    "eval.rollout.max_new_tokens=8",
    "eval.rollout.cpu_kv_cache_gib=0.1",
    "eval.bootstrap=20",
    "eval.examples=2",
)


def rl_words(toy: Path, out: Path, *extra: str) -> list[str]:
    return [
        f"av={toy / 'sft_av' / 'hf'}", f"ar={toy / 'sft_ar' / 'hf'}", f"data={toy / 'build' / 'rl.parquet'}",
        f"held_out={toy / 'build' / 'held_out.parquet'}", f"out={out}", "rollout.max_new_tokens=8", "steps=2",
        "rollout.cpu_kv_cache_gib=0.1", "batch_size=2", "samples_per_prompt=2", "micro_batch_size=2", "optim.lr=1e-2",
        "optim.weight_decay=10", *extra,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def swept(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds, two jobs at a time, a checkpoint of every step for good."""
    out = tmp_path_factory.mktemp("swept") / "rl"
    words = ("seed=0,1", "keep_every=1", "save_every=1", "keep_checkpoints=1", "sweep.jobs=2")
    done = command_line("rl", "-m", *rl_words(toy, out, *words))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 done" in done.stdout
    return out


def metrics(run: Path) -> list[dict[str, Any]]:
    kept = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("seconds_")} for line in kept]


def results(out: Path) -> list[dict[str, Any]]:
    return list(json.loads((out / "results.json").read_text())["runs"])


def test_a_job_is_the_run_that_it_would_be_alone(toy: Path, swept: Path, tmp_path: Path) -> None:
    done = command("rl", *rl_words(toy, tmp_path / "alone", "seed=1"))
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "alone") == metrics(swept / "001_seed=1")


def test_permanent_checkpoints_are_never_pruned_and_resumed_from(toy: Path, swept: Path, tmp_path: Path) -> None:
    source = swept / "000_seed=0"
    assert sorted(path.name for path in (source / "checkpoints").iterdir()) == ["permanent"]
    kept = sorted(path.name for path in (source / "checkpoints" / "permanent").iterdir())
    assert kept == ["step_00000001", "step_00000002"]
    run = Path(shutil.copytree(source, tmp_path / "run"))
    (run / "done").unlink()
    shutil.rmtree(run / "checkpoints" / "permanent" / "step_00000002")
    done = command("rl", *rl_words(toy, run, "save_every=10"))
    assert done.returncode == 0, done.stderr
    assert metrics(run) == metrics(source)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["permanent", "step_00000002"]


def test_a_sweep_that_is_stopped_ends_its_jobs_and_is_resumed(toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [
        "pretrain", "-m", f"corpus={toy / 'corpus.parquet'}", f"tokenizer={toy / 'tokenizer'}", f"out={out}",
        "architecture.hidden_size=64", "architecture.intermediate_size=64", "architecture.head_dim=32", "batch_size=2",
        "micro_batch_size=2", "sequence_length=64", "save_every=1", "steps=40,41", "sweep.jobs=2",
    ]  # fmt: skip
    child = start(*words)
    deadline = time.monotonic() + 200
    while len(list(out.glob("*/metrics.jsonl"))) < 2 and child.process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    everybody = psutil.Process(child.process.pid).children(recursive=True)
    assert child.process.pid is not None and len(everybody) >= 4, "two jobs, a rank of each"
    os.kill(child.process.pid, signal.SIGTERM)
    assert child.wait(60).returncode != 0
    assert psutil.wait_procs(everybody, timeout=30)[1] == []
    done = command(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = sorted(out.glob("0*"))
    assert [[line["step"] for line in metrics(run)] for run in runs] == [list(range(40)), list(range(41))]


def test_every_kept_checkpoint_is_evaluated_once(swept: Path, tmp_path: Path) -> None:
    out = tmp_path / "compared"
    words = ("compare", f"root={swept}", f"out={out}", "checkpoints=permanent", "jobs=2", *EVAL)
    done = command_line(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {(row["seed"], row["step"]): row for row in results(out)}
    assert sorted(rows) == [(seed, step) for seed in (0, 1) for step in (1, 2)]
    assert all(row["injected"] == row["expected_injections"] > 0 for row in rows.values())
    groups = json.loads((out / "results.json").read_text())["groups"]
    assert sorted((group["label"], group["n"]) for group in groups) == [(f"step {step}", 2) for step in (1, 2)]
    times = {path: path.stat().st_mtime_ns for path in out.glob("evaluations/*/*/eval.json")}
    again = command_line(*words)
    assert again.returncode == 0 and "4 done already" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in out.glob("evaluations/*/*/eval.json")} == times


def test_the_last_kept_checkpoint_is_what_the_run_exported(swept: Path, tmp_path: Path) -> None:
    """The same weights and figures to the bit, by way of `convert` and by way of the run's own export."""
    for kind in ("final", "permanent"):
        done = command(
            "compare", f"root={swept / '001_seed=1'}", f"out={tmp_path / kind}", f"checkpoints={kind}", *EVAL
        )
        assert done.returncode == 0, done.stdout + done.stderr
    (final,) = results(tmp_path / "final")
    kept = {row["step"]: row for row in results(tmp_path / "permanent")}
    measured = [key for key in final if key.startswith("fve_")]
    assert measured and {key: kept[2][key] for key in measured} == {key: final[key] for key in measured}
    folders = (tmp_path / "permanent" / "models").glob("*/*/av")
    models = {read_model_sidecar(path).training["steps"]: load_file(path / "model.safetensors") for path in folders}
    own = load_file(swept / "001_seed=1" / "av" / "model.safetensors")
    assert sorted(models) == [1, 2] and set(models[2]) == set(own)
    assert all(bool((models[2][name] == own[name]).all()) for name in own)
    assert any(bool((models[1][name] != own[name]).any()) for name in own), "it was trained on since"
    again = command("compare", f"root={swept / '001_seed=1'}", f"out={tmp_path / 'final'}", *EVAL[1:], "eval.rows=12")
    assert again.returncode == 0 and "0 done already" in again.stderr, "other rows are another evaluation"
    assert results(tmp_path / "final")[0]["rows"] == 12
