"""`export`: a checkpoint of an `rl` run as the models that the run exports at its end.

`convert export` makes a model of a checkpoint that holds all of it. Adapters, projections and strength predictors are
only part of one: the run's models are built as its record says, the checkpoint is loaded into them, and the task's side
exports them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from nla_megatron.config.compose import restored
from nla_megatron.config.run_directory import (
    CHECKPOINTS,
    RECORD,
    check_run_directory,
    claim_run_directory,
    configuration_of,
    is_done,
    mark_done,
    read_record,
    run_record,
)
from nla_megatron.config.schema import CurriculumConfig, ExportConfig, RlConfig
from nla_megatron.config.unread import Unread
from nla_megatron.conversion.hf import read_shape
from nla_megatron.errors import CheckpointError, ConfigError, MissingFile
from nla_megatron.models.builder import check_layout
from nla_megatron.parallel.collectives import barrier
from nla_megatron.parallel.world import World, data_parallel_size
from nla_megatron.training.checkpoint import load_modules
from nla_megatron.training.lora import check_lora
from nla_megatron.training.sides import make_side, side_of


def check(config: ExportConfig, world_size: int) -> None:
    """Everything that can be known before a model is built; raises a named error."""
    data_parallel_size(config.parallel, world_size)
    if is_done(config):
        # What it was made of may be gone by now.
        check_run_directory("export", config)
        return
    run = run_of(config)
    side = side_of(run)
    if side.alone(run) is not None:
        raise ConfigError(
            f"{config.checkpoint}, of a run that samples nothing", "a checkpoint of the loop",
            "take what the run exported at its end",
        )  # fmt: skip
    side.check(run, world_size)
    shape = read_shape(side.directory_of(run))
    check_layout(shape, run.parallel)
    check_lora(run.lora, shape, run.parallel)
    check_run_directory("export", config)


def unread(config: ExportConfig) -> Iterator[Unread]:
    """Nothing is drawn here."""
    yield "seed", "in export"


def run(config: ExportConfig, world: World) -> None:
    if world.is_main:
        claim_run_directory("export", config)
    barrier(world)
    side = make_side(run_of(config), world)
    load_modules(Path(config.checkpoint), side.learners)
    side.export()
    if world.is_main:
        mark_done(config)


def run_of(config: ExportConfig) -> RlConfig:
    """The configuration of the checkpoint's run as it would be had it ended there, with the layout and place of this
    command.

    Raises:
        MissingFile: no checkpoint, or no run around it.
        CheckpointError: of another command's run.
        ConfigError: a record with keys that are not known.
    """
    checkpoint = Path(config.checkpoint)
    state = checkpoint / "state.json"
    if not state.is_file():
        raise MissingFile(f"no {state}", "the directory of a step in a run's checkpoints", "correct checkpoint=")
    inside = next((folder for folder in checkpoint.resolve().parents if folder.name == CHECKPOINTS), checkpoint)
    record = inside.parent / RECORD
    if not record.is_file():
        raise MissingFile(f"no {record}", f"the {RECORD} of the run that wrote {checkpoint}", "correct checkpoint=")
    values = read_record(record)
    if values["command"] != "rl":
        raise CheckpointError(
            f"{checkpoint}, of a run of {values['command']}", "a checkpoint of rl",
            "take what the run exported at its end; of a whole model, convert export",
        )  # fmt: skip
    recorded: RlConfig = restored("rl", {**configuration_of(values), "out": config.out})
    for key, identity in run_record("rl", recorded)["inputs"].items():
        if identity != (read := values.get("inputs", {}).get(key, identity)):
            raise CheckpointError(
                f"the table {identity} at {key}", f"{read}, which the run of {checkpoint} read", "put that one back"
            )
    # The way to the last step does not matter. Held-out rows do: without them a task would train on other rows.
    return replace(
        recorded, parallel=config.parallel, steps=int(json.loads(state.read_text())["step"]),
        curriculum=CurriculumConfig(),
    )  # fmt: skip
