"""Hugging Face to a megatron-core checkpoint on one layout, back on another: every tensor to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.ranks import command


@pytest.fixture(scope="module")
def imported(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("convert") / "megatron"
    done = command("convert", "direction=import", f"input={toy / 'pretrain' / 'hf'}", f"out={out}", "parallel=tp2")
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def test_a_checkpoint_written_at_pp2_exports_bit_exact_at_tp2(toy: Path, tmp_path: Path) -> None:
    for arguments in (
        ("direction=import", f"input={toy / 'pretrain' / 'hf'}", f"out={tmp_path / 'megatron'}", "parallel=pp2"),
        ("direction=export", f"input={tmp_path / 'megatron'}", f"out={tmp_path / 'hf'}", "parallel=tp2"),
    ):
        done = command("convert", *arguments)
        assert done.returncode == 0, done.stderr[-4000:]
    before, after = (load_file(path / "model.safetensors") for path in (toy / "pretrain" / "hf", tmp_path / "hf"))
    assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("layout", ["single", "pp2"])
def test_a_checkpoint_written_at_tp2_exports_bit_exact(toy: Path, imported: Path, tmp_path: Path, layout: str) -> None:
    out = tmp_path / "hf"
    done = command("convert", "direction=export", f"input={imported}", f"out={out}", f"parallel={layout}")
    assert done.returncode == 0, done.stderr[-4000:]
    before, after = (load_file(path / "model.safetensors") for path in (toy / "pretrain" / "hf", out))
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_exported_directory_is_one_that_transformers_loads(toy: Path, imported: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "hf"
    assert command("convert", "direction=export", f"input={imported}", f"out={out}").returncode == 0
    ids = AutoTokenizer.from_pretrained(out)("The with statement", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (toy / "pretrain" / "hf", out)]
    assert torch.equal(*logits)
