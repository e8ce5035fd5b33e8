"""A run that is killed goes on where it was: to the bit on its own layout, within rounding on another."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from tests.support.ranks import command, start, wait_until_gone

STEPS = 24


def sft_arguments(toy: Path, role: str, out: Path, *extra: str) -> list[str]:
    return [
        "sft",
        f"role={role}",
        f"model={toy / 'pretrain' / 'hf'}",
        f"data={toy / 'build' / f'{role}_sft.parquet'}",
        f"out={out}",
        f"steps={STEPS}",
        "batch_size=8",
        "micro_batch_size=4",
        "optim.lr=1e-3",
        "save_every=4",
        *extra,
    ]


def metrics(run: Path) -> list[dict[str, Any]]:
    kept = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("seconds_")} for line in kept]


def kill_one_rank_at(step: int, run: Path, arguments: list[str]) -> tuple[int, str]:
    """Kill -9 one rank of a command once `step` is logged and a checkpoint is there; (exit code, stderr)."""
    child = start(*arguments)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and child.process.is_alive():
        log = run / "metrics.jsonl"
        if (
            log.is_file()
            and len(log.read_text().splitlines()) > step
            and list(run.glob("checkpoints/step_*/state.json"))
        ):
            break
        time.sleep(0.02)
    found = subprocess.run(["pgrep", "-P", str(child.process.pid)], capture_output=True, text=True, check=True)
    ranks = [int(rank) for rank in found.stdout.split()]
    os.kill(ranks[-1], signal.SIGKILL)
    done = child.wait(90)
    wait_until_gone(ranks)
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def whole(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "av"
    assert command(*sft_arguments(toy, "av", out, "parallel=tp2")).returncode == 0
    return out


@pytest.fixture(scope="module")
def killed(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("killed") / "av"
    code, errors = kill_one_rank_at(9, out, sft_arguments(toy, "av", out, "parallel=tp2"))
    assert code == 128 + signal.SIGKILL
    assert "SIGKILL" in errors and "resume" in errors
    assert len(metrics(out)) < STEPS and not (out / "done").exists() and not (out / "hf").exists()
    return out


def test_resumed_losses_are_bit_identical_on_the_same_layout(
    toy: Path, whole: Path, killed: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(killed, tmp_path / "run"))
    assert command(*sft_arguments(toy, "av", run, "parallel=tp2")).returncode == 0
    assert metrics(run) == metrics(whole)
    resumed, straight = (load_file(path / "hf" / "model.safetensors") for path in (run, whole))
    assert all(bool((resumed[name] == straight[name]).all()) for name in straight)


@pytest.mark.parametrize("layout", ["pp2", "dp2"])
def test_resumed_losses_agree_within_rounding_on_another_layout(
    toy: Path, whole: Path, killed: Path, tmp_path: Path, layout: str
) -> None:
    run = Path(shutil.copytree(killed, tmp_path / "run"))
    assert command(*sft_arguments(toy, "av", run, f"parallel={layout}")).returncode == 0
    assert [line["step"] for line in metrics(run)] == list(range(STEPS))
    for resumed, straight in zip(metrics(run), metrics(whole), strict=True):
        assert resumed["loss"] == pytest.approx(straight["loss"], rel=1e-4)
        assert resumed["lr"] == straight["lr"]


def test_a_killed_rl_run_resumes_to_the_bit(toy: Path, tmp_path: Path) -> None:
    """Both models, both optimizers, the sampler's weights and seeds: all is as in the run that went through."""
    out = tmp_path / "rl"
    recorded = yaml.safe_load((toy / "rl" / "run.yaml").read_text())
    arguments = ["rl", f"out={out}", *overrides_of(recorded)]
    code, _ = kill_one_rank_at(0, out, arguments)
    assert code == 128 + signal.SIGKILL
    done = command(*arguments)
    assert done.returncode == 0, done.stderr[-4000:]
    assert metrics(out) == metrics(toy / "rl")
    for role in ("av", "ar"):
        resumed, straight = (load_file(path / role / "model.safetensors") for path in (out, toy / "rl"))
        assert all(bool((resumed[name] == straight[name]).all()) for name in straight)


def overrides_of(recorded: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in recorded.items():
        if key in ("command", "inputs"):
            continue
        if isinstance(value, dict):
            found += overrides_of(value, f"{prefix}{key}.")
        else:
            found.append(f"{prefix}{key}={'null' if value is None else json.dumps(value)}")
    return found


def test_a_killed_save_leaves_nothing_that_looks_finished(toy: Path, killed: Path, tmp_path: Path) -> None:
    """A half-written checkpoint is passed over: the newest whole one is resumed from."""
    run = Path(shutil.copytree(killed, tmp_path / "run"))
    newest = max(run.glob("checkpoints/step_????????"))
    torn = run / "checkpoints" / "step_00000099.partial"
    shutil.copytree(newest, torn)
    done = command(*sft_arguments(toy, "av", run, "parallel=tp2"))
    assert done.returncode == 0 and not torn.exists()
    assert [line["step"] for line in metrics(run)] == list(range(STEPS))
