"""What the demo trained, through megatron-core checkpoints and back, as a user types it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.ranks import command


@pytest.fixture(scope="module")
def imported(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("convert") / "megatron"
    done = command("convert", "import", f"hf={toy / 'pretrain' / 'hf'}", f"out={out}", "processes=2")
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def test_an_import_is_verified_and_exports_what_transformers_loads(toy: Path, imported: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf, out = toy / "pretrain" / "hf", tmp_path / "hf"
    for arguments in (
        ("export", f"checkpoint={imported}", f"out={out}"),
        ("verify", f"hf={out}", f"checkpoint={imported}", "parallel=tp2"),
    ):
        done = command("convert", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    ids = AutoTokenizer.from_pretrained(out)("The with statement", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (hf, out)]
    assert torch.equal(*logits)


def test_the_last_checkpoint_of_a_run_exports_to_what_the_run_exported(toy: Path, tmp_path: Path) -> None:
    last = max((toy / "pretrain" / "checkpoints").glob("step_*"))
    [module] = [path for path in last.iterdir() if path.is_dir()]
    hf, out = toy / "pretrain" / "hf", tmp_path / "hf"
    done = command("convert", "export", f"checkpoint={module}", f"hf={hf}", f"out={out}")
    assert done.returncode == 0, done.stderr[-4000:]
    before, after = (load_file(path / "model.safetensors") for path in (hf, out))
    assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)
