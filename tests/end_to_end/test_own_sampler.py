"""`rl` without vLLM, from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.credited import PROMPTS, SAMPLES, overrides, write_files
from tests.support.tiny import tiny_model

WITHOUT_VLLM = (
    "import sys; sys.modules['vllm'] = None; from nla_megatron.launch.commands import run; sys.exit(run(sys.argv[1:]))"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("without")
    write_files(path)
    return path


def without_vllm(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITHOUT_VLLM, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["nla", "lexical"])
def test_rl_runs_where_there_is_no_vllm(folder: Path, task: str) -> None:
    """With `lexical`, on 4-bit weights."""
    words = [word for word in overrides(folder, "single", "grpo", task) if not word.startswith("steps=")]
    out = next(Path(word.removeprefix("out=")) for word in words if word.startswith("out="))
    more = ("steps=2", "rollout.engine=policy", "rollout.max_new_tokens=5", "rollout.record=true")
    if task == "lexical":
        wide = tiny_model(folder / "wide", ffn_hidden_size=128)
        words = [f"model={wide}" if word.startswith("model=") else word for word in words]
        more += ("lora.rank=2", "lora.quantize=nf4")
    done = without_vllm("rl", *words, *more)
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2 and all(step["logprob_gap_max"] <= 1e-5 for step in steps)
    recorded = (out / "rollouts" / "step_00000000.jsonl").read_text().splitlines()
    assert len(recorded) == PROMPTS * SAMPLES
    assert (out / ("av" if task == "nla" else "hf") / "model.safetensors").is_file()


def test_without_vllm_the_default_is_refused_with_the_way_out(folder: Path, tmp_path: Path) -> None:
    words = [word for word in overrides(folder, "single", "grpo", "lexical") if not word.startswith("out=")]
    done = without_vllm("rl", *words, f"out={tmp_path / 'refused'}")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "no vLLM" in done.stderr and "rollout.engine=policy" in done.stderr
    assert not (tmp_path / "refused").exists()
    model, data = folder / "model", folder / "prompts.jsonl"
    done = without_vllm("eval", "task=lexical", f"model={model}", f"data={data}", f"out={tmp_path / 'refused'}")
    assert done.returncode != 0 and "Traceback" not in done.stderr and "no vLLM" in done.stderr
    assert not (tmp_path / "refused").exists()
