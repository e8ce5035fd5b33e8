"""Each mistake a user can make: one message that names found, expected and remedy, exit code 2, before any training."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from nla_megatron.cli import main
from nla_megatron.contract import columns
from nla_megatron.contract.sidecar import read_dataset_sidecar, write_dataset_sidecar
from nla_megatron.contract.tables import Table, write_table
from tests.support.ranks import ROOT, command, environment


def sft(toy: Path, out: Path, *overrides: str) -> list[str]:
    return [
        "sft",
        "role=av",
        f"model={toy / 'pretrain' / 'hf'}",
        f"data={toy / 'build' / 'av_sft.parquet'}",
        f"out={out}",
        "steps=1",
        *overrides,
    ]


def rl(toy: Path, out: Path, *overrides: str) -> list[str]:
    return [
        "rl",
        f"av={toy / 'sft_av' / 'hf'}",
        f"ar={toy / 'sft_ar' / 'hf'}",
        f"data={toy / 'build' / 'rl.parquet'}",
        f"out={out}",
        "steps=1",
        "rollout.max_new_tokens=8",
        *overrides,
    ]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Runs a command that must be refused; returns the message, after checking its form and that nothing was begun."""

    def run(kind: str, *arguments: str) -> str:
        assert main(arguments) == 2
        message = capsys.readouterr().err
        assert message.startswith(f"{kind}: ") and message.count("expected: ") == 1 and message.count("to do: ") == 1
        assert not list(tmp_path.rglob("metrics.jsonl")) and not list(tmp_path.rglob("run.yaml"))
        return message

    return run


def copy_of_table(toy: Path, name: str, directory: Path) -> Path:
    for path in (toy / "build").glob(f"{name}.parquet*"):
        shutil.copy(path, directory)
    return directory / f"{name}.parquet"


def test_unknown_config_key(toy: Path, tmp_path: Path, refused: Any) -> None:
    message = refused("ConfigError", *sft(toy, tmp_path / "run", "stepz=3"))
    assert "stepz" in message and "did you mean steps?" in message


def test_unknown_config_key_with_a_plus(toy: Path, tmp_path: Path, refused: Any) -> None:
    assert "extra" in refused("ConfigError", *sft(toy, tmp_path / "run", "+extra=3"))


def test_missing_file(toy: Path, tmp_path: Path, refused: Any) -> None:
    message = refused("MissingFile", *sft(toy, tmp_path / "run", f"data={tmp_path / 'nowhere.parquet'}"))
    assert "nowhere.parquet" in message


def test_missing_model(toy: Path, tmp_path: Path, refused: Any) -> None:
    message = refused("MissingFile", *sft(toy, tmp_path / "run", f"model={tmp_path / 'nowhere'}"))
    assert "nowhere" in message


def test_wrong_column(toy: Path, tmp_path: Path, refused: Any) -> None:
    message = refused("ColumnError", *sft(toy, tmp_path / "run", f"data={toy / 'build' / 'rl.parquet'}"))
    assert "response" in message


def test_vectors_of_another_width(toy: Path, tmp_path: Path, refused: Any) -> None:
    source = Table.open(toy / "build" / "av_sft.parquet", "av_sft")
    names = [name for name in columns.schema("av_sft", 32).names if name != columns.VECTOR]
    batch = {name: source.column(name)[:8] for name in names}
    narrow = tmp_path / "narrow.parquet"
    write_table(narrow, [{**batch, columns.VECTOR: np.ones((8, 32), np.float32)}], columns.schema("av_sft", 32))
    sidecar = read_dataset_sidecar(source.path)
    write_dataset_sidecar(narrow, replace(sidecar, row_count=8, extraction=replace(sidecar.extraction, d_model=32)))
    message = refused("WidthError", *sft(toy, tmp_path / "run", f"data={narrow}"))
    assert "32" in message and "64" in message


@pytest.mark.parametrize("key", ["lora", "ar_lora"])
def test_4_bit_weights_without_bitsandbytes(
    toy: Path, tmp_path: Path, refused: Any, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    message = refused("VersionError", *rl(toy, tmp_path / "run", f"{key}.rank=2", f"{key}.quantize=nf4"))
    assert "no bitsandbytes" in message and "pip install" in message


def test_sidecar_of_another_tokenizer(toy: Path, tmp_path: Path, refused: Any) -> None:
    data = copy_of_table(toy, "av_sft", tmp_path)
    sidecar = read_dataset_sidecar(data)
    assert sidecar.tokens is not None
    other = replace(sidecar.tokens, injection_left_neighbor_id=sidecar.tokens.injection_left_neighbor_id + 1)
    write_dataset_sidecar(data, replace(sidecar, tokens=other))
    message = refused("SidecarError", *sft(toy, tmp_path / "run", f"data={data}"))
    assert str(other.injection_left_neighbor_id) in message and "tokenizer" in message


def test_missing_sidecar(toy: Path, tmp_path: Path, refused: Any) -> None:
    data = tmp_path / "av_sft.parquet"
    shutil.copy(toy / "build" / "av_sft.parquet", data)
    assert "nla_meta.yaml" in refused("MissingFile", *sft(toy, tmp_path / "run", f"data={data}"))


def test_world_size_that_tp_times_pp_does_not_divide(
    toy: Path, tmp_path: Path, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    message = refused("LayoutError", *sft(toy, tmp_path / "run", "parallel=tp2"))
    assert "3 processes" in message and "multiple of 2" in message


def test_world_size_that_rollout_tp_does_not_divide(
    toy: Path, tmp_path: Path, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "rollout.tp=4" in refused("LayoutError", *rl(toy, tmp_path / "run", "parallel=tp2", "rollout.tp=4"))


def test_heads_not_divisible_by_tp(toy: Path, tmp_path: Path, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    message = refused("LayoutError", *sft(toy, tmp_path / "run", "parallel.tp=3"))
    assert "attention heads" in message and "parallel.tp=3" in message


def test_more_pipeline_stages_than_blocks(
    toy: Path, tmp_path: Path, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert "parallel.pp=8" in refused("LayoutError", *sft(toy, tmp_path / "run", "parallel.pp=8"))


def test_marker_that_is_several_tokens(toy: Path, tmp_path: Path, refused: Any) -> None:
    message = refused(
        "MarkerError",
        "build",
        f"input={toy / 'explain' / 'explained.parquet'}",
        f"model={toy / 'pretrain' / 'hf'}",
        f"out={tmp_path / 'run'}",
        "templates.marker='㊙'",
        "templates.av='Explain <concept><INJECT></concept>'",
    )
    assert "㊙" in message and "one id" in message


def test_output_directory_of_another_run(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (toy / "sft_av" / "run.yaml").read_text()
    assert main(sft(toy, toy / "sft_av")) == 2
    message = capsys.readouterr().err
    assert message.startswith("RunDirectoryError: ") and "holds a run with" in message
    assert (toy / "sft_av" / "run.yaml").read_text() == before


def test_output_directory_with_foreign_files(toy: Path, tmp_path: Path, refused: Any) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("")
    refused("RunDirectoryError", *sft(toy, tmp_path / "run"))


def test_av_and_ar_of_other_roles(toy: Path, tmp_path: Path, refused: Any) -> None:
    message = refused("SidecarError", *rl(toy, tmp_path / "run", f"ar={toy / 'sft_av' / 'hf'}"))
    assert "role" in message


def test_av_trained_with_another_injection(toy: Path, tmp_path: Path, refused: Any) -> None:
    data = copy_of_table(toy, "rl", tmp_path)
    path = Path(f"{data}.nla_meta.yaml")
    sidecar = yaml.safe_load(path.read_text())
    sidecar["injection"]["scale"] = 2.0
    path.write_text(yaml.safe_dump(sidecar))
    assert "injection" in refused("SidecarError", *rl(toy, tmp_path / "run", f"data={data}"))


def test_group_of_one(toy: Path, tmp_path: Path, refused: Any) -> None:
    assert "samples_per_prompt=1" in refused("ConfigError", *rl(toy, tmp_path / "run", "samples_per_prompt=1"))


def test_responses_longer_than_the_model(toy: Path, tmp_path: Path, refused: Any) -> None:
    assert "max_new_tokens" in refused("LayoutError", *rl(toy, tmp_path / "run", "rollout.max_new_tokens=4000"))


def test_evaluating_without_held_out_rows(toy: Path, tmp_path: Path, refused: Any) -> None:
    assert "held_out" in refused("ConfigError", *rl(toy, tmp_path / "run", "eval_every=1"))


def test_table_that_is_not_its_sidecars(toy: Path, tmp_path: Path, refused: Any) -> None:
    data = copy_of_table(toy, "av_sft", tmp_path)
    sidecar = read_dataset_sidecar(data)
    write_dataset_sidecar(data, replace(sidecar, row_count=sidecar.row_count + 1))
    assert "rows" in refused("SidecarError", *sft(toy, tmp_path / "run", f"data={data}"))


def test_injection_beyond_the_models_depth(toy: Path, tmp_path: Path, refused: Any) -> None:
    data = copy_of_table(toy, "av_sft", tmp_path)
    sidecar = read_dataset_sidecar(data)
    assert sidecar.injection is not None
    write_dataset_sidecar(data, replace(sidecar, injection=replace(sidecar.injection, layer=9)))
    assert "injection.layer = 9" in refused("SidecarError", *sft(toy, tmp_path / "run", f"data={data}"))


def test_unsupported_architecture(toy: Path, tmp_path: Path, refused: Any) -> None:
    model = Path(shutil.copytree(toy / "pretrain" / "hf", tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))
    assert "GPT2LMHeadModel" in refused("UnsupportedModel", *sft(toy, tmp_path / "run", f"model={model}"))


def test_unknown_command(refused: Any) -> None:
    assert "dance" in refused("ConfigError", "dance")


def test_all_ranks_end_with_one_message(toy: Path, tmp_path: Path) -> None:
    done = command(*sft(toy, tmp_path / "run", "parallel=tp2", f"data={tmp_path / 'nowhere.parquet'}"), timeout=120)
    assert done.returncode == 2
    assert done.stderr.count("MissingFile") == 1 and "Traceback" not in done.stderr


def test_a_mistake_that_one_rank_meets_is_told_once_and_ends_all(toy: Path, tmp_path: Path) -> None:
    """A vector without direction is found by the one rank that reads its row, in the middle of a step."""
    source = Table.open(toy / "build" / "av_sft.parquet", "av_sft")
    rows = list(range(8))
    batch = {
        name: [source.column(name)[row] for row in rows]
        for name in columns.schema("av_sft", 64).names
        if name != columns.VECTOR
    }
    vectors = source.vectors(rows).copy()
    vectors[5] = 0.0
    bad = tmp_path / "bad.parquet"
    write_table(bad, [{**batch, columns.VECTOR: vectors}], columns.schema("av_sft", 64))
    write_dataset_sidecar(bad, replace(read_dataset_sidecar(source.path), row_count=8))
    done = command(
        *sft(toy, tmp_path / "run", "parallel=dp2", f"data={bad}", "batch_size=8", "micro_batch_size=1"), timeout=150
    )
    assert done.returncode == 2
    assert done.stderr.count("ColumnError") == 1 and "Traceback" not in done.stderr


def test_torchrun_with_a_world_that_does_not_fit(toy: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=3",
            "-m",
            "nla_megatron",
            *sft(toy, tmp_path / "run", "parallel=tp2"),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert done.returncode != 0
    assert done.stderr.count("LayoutError") == 1


@pytest.mark.parametrize("key", ["ar_updates=2", "ar_loss.kind=cosine", "av=somewhere", "ar_optim.lr=1.0"])
def test_a_key_of_another_task_is_named(toy: Path, tmp_path: Path, refused: Any, key: str) -> None:
    message = refused("ConfigError", "rl", "task=lexical", f"model={toy / 'pretrain' / 'hf'}", f"out={tmp_path}", key)
    assert key.partition("=")[0].partition(".")[0] in message and "task=lexical" in message
