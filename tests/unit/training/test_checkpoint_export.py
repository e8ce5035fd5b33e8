"""`export`: of which run a checkpoint is, how that run is seen, and what is refused by name before a model is built."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from nla_megatron.config.compose import compose
from nla_megatron.config.run_directory import RECORD, claim_run_directory
from nla_megatron.config.schema import ParallelConfig
from nla_megatron.contract.sidecar import read_dataset_sidecar, read_model_sidecar
from nla_megatron.conversion.projections import PROJECTION_FILE
from nla_megatron.errors import CheckpointError, ConfigError, MissingFile, NlaError
from nla_megatron.parallel.world import World
from nla_megatron.training.checkpoint import Checkpoints
from nla_megatron.training.checkpoint_export import check, run, run_of
from nla_megatron.training.sides import make_side
from tests.support.credited import overrides, write_files
from tests.support.runs import left_run


def step(run: Path, number: int = 3, permanent: bool = True) -> Path:
    made = run / "checkpoints" / ("permanent" if permanent else "") / f"step_{number:08d}"
    made.mkdir(parents=True)
    (made / "state.json").write_text(json.dumps({"step": number}))
    return made


@pytest.mark.parametrize("permanent", [True, False])
def test_a_checkpoint_is_of_the_run_around_it_ended_at_its_step(tmp_path: Path, permanent: bool) -> None:
    words = ("steps=30", "lora.rank=4", "curriculum={kind:linear,start:0,steps:9}", "held_out=h")
    made = step(left_run(tmp_path / "a" / "run", *words, "parallel=pp2"), 3, permanent)
    config = compose("export", [f"checkpoint={made}", f"out={tmp_path / 'models'}", "parallel=tp2"])
    seen = run_of(config)
    assert (seen.lora.rank, seen.steps, seen.out, seen.av) == (4, 3, str(tmp_path / "models"), "av")
    assert (seen.curriculum.steps, seen.held_out) == (0, "h")
    assert seen.parallel == ParallelConfig(tp=2)


def test_a_run_that_is_older_than_a_key_is_one_with_its_default(tmp_path: Path) -> None:
    made = step(left_run(tmp_path / "a" / "run", "steps=30"))
    record = yaml.safe_load((tmp_path / "a" / "run" / RECORD).read_text())
    del record["lora"], record["rollout"]["engine"]
    (tmp_path / "a" / "run" / RECORD).write_text(yaml.safe_dump(record))
    seen = run_of(compose("export", [f"checkpoint={made}", "out=models"]))
    assert (seen.lora.rank, seen.rollout.engine) == (0, "vllm")


@pytest.mark.parametrize(
    ("command", "words", "error", "found"),
    [
        ("pretrain", [], CheckpointError, "of a run of pretrain"),
        ("rl", ["task=sae", "model=m", "task.options.objective=mse"], ConfigError, "a run that samples nothing"),
        ("rl", [], MissingFile, "rl.parquet"),
    ],
)
def test_what_cannot_be_exported_is_named(
    tmp_path: Path, command: str, words: list[str], error: type[NlaError], found: str
) -> None:
    made = step(left_run(tmp_path / "run", "steps=30", *words, command=command))
    with pytest.raises(error, match=found):
        check(compose("export", [f"checkpoint={made}", f"out={tmp_path / 'models'}"]), 1)
    assert not (tmp_path / "models").exists()


def test_a_directory_that_is_no_checkpoint_or_of_no_run_is_named(tmp_path: Path) -> None:
    config = compose("export", [f"checkpoint={tmp_path}", f"out={tmp_path / 'models'}"])
    with pytest.raises(MissingFile, match=r"no .*state.json"):
        check(config, 1)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(MissingFile, match=rf"the {RECORD} of the run that wrote"):
        check(config, 1)


def test_models_are_those_of_the_checkpoint_with_adapters_and_projections(world: World, tmp_path: Path) -> None:
    """Of a policy that is neither what the run began with, nor where it is when the checkpoint is exported."""
    write_files(tmp_path)
    words = [*overrides(tmp_path, "single", "ppo projected", "nla"), "lora.rank=2", "ar_lora.rank=2"]
    config = compose("rl", words)
    claim_run_directory("rl", config)
    side = make_side(config, world)
    moved(side.model)
    Checkpoints(config.out, "rl", world, 1).save(2, side.learners, {}, {})
    side.export()
    moved(side.model)
    kept = Path(config.out) / "checkpoints" / "step_00000002"
    told = compose("export", [f"checkpoint={kept}", f"out={tmp_path / 'models'}"])
    check(told, 1)
    run(told, world)
    begun, expected, found = tmp_path / "projecting", Path(config.out) / "av", tmp_path / "models" / "av"
    for name in ("model.safetensors", PROJECTION_FILE):
        own, other = load_file(expected / name), load_file(found / name)
        assert own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own)
        assert any(not torch.equal(tensor, other[key]) for key, tensor in load_file(begun / name).items())
    assert read_model_sidecar(found).training["steps"] == 2
    assert read_model_sidecar(found).injection == read_model_sidecar(expected).injection

    record = Path(config.out) / RECORD
    record.write_text(record.read_text().replace(read_dataset_sidecar(config.data).dataset_id, "another"))
    with pytest.raises(CheckpointError, match="at data"):
        check(compose("export", [f"checkpoint={kept}", f"out={tmp_path / 'again'}"]), 1)
    shutil.rmtree(kept)
    check(told, 1)  # finished: what it was made of is not asked for


@torch.no_grad()
def moved(model: Any) -> None:
    """What learns goes on by a little."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
