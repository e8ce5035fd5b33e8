"""`convert`: a Hugging Face directory to a megatron-core distributed checkpoint (`torch_dist`), and back.

out/weights/…                 the distributed checkpoint, readable at any TP x PP
out/config.json, tokenizer…   what goes with the weights in a Hugging Face directory
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nla_megatron.config.run_directory import check_run_directory, claim_run_directory, mark_done
from nla_megatron.config.schema import ConvertConfig
from nla_megatron.conversion.hf import copy_companions, read_config, read_shape, write_shards
from nla_megatron.conversion.live import Exporter, load_from_hf
from nla_megatron.errors import MissingFile
from nla_megatron.models.builder import DTYPES, check_layout
from nla_megatron.models.verbalizer import build_verbalizer
from nla_megatron.parallel.collectives import barrier
from nla_megatron.parallel.cpu import megatron_device
from nla_megatron.parallel.world import World, data_parallel_size

WEIGHTS = "weights"


def check(config: ConvertConfig, world_size: int) -> None:
    """Everything that can be known before the first tensor; raises a named error."""
    data_parallel_size(config.parallel, world_size)
    check_layout(read_shape(config.input), config.parallel.tp, config.parallel.pp)
    if config.direction == "export" and not (Path(config.input) / WEIGHTS / "metadata.json").is_file():
        raise MissingFile(
            f"no {Path(config.input) / WEIGHTS}", "a directory that `convert direction=import` wrote", "correct input="
        )
    check_run_directory("convert", config)


def run(config: ConvertConfig, world: World) -> None:
    if world.is_main:
        claim_run_directory("convert", config)
    barrier(world)
    shape = read_shape(config.input)
    model = build_verbalizer(shape, world, config.dtype)
    if config.direction == "import":
        load_from_hf(model, config.input, shape, world, with_head=True)
        _save(model, Path(config.out) / WEIGHTS, world)
    else:
        _load(model, Path(config.input) / WEIGHTS)
        tensors = Exporter(model, shape, world, with_head=True).tensors(DTYPES[config.dtype])
        if world.is_main:
            write_shards(Path(config.out), tensors)
        else:
            for _ in tensors:
                pass
    if world.is_main:
        copy_companions(Path(config.input), Path(config.out), read_config(config.input), DTYPES[config.dtype])
        mark_done(config)
    barrier(world)


def _save(model: Any, directory: Path, world: World) -> None:
    from megatron.core import dist_checkpointing

    if world.is_main:
        directory.mkdir(parents=True, exist_ok=True)
    barrier(world)
    with megatron_device():
        dist_checkpointing.save({"model": model.sharded_state_dict()}, str(directory))


def _load(model: Any, directory: Path) -> None:
    from megatron.core import dist_checkpointing

    with megatron_device(), torch.no_grad():
        model.load_state_dict(dist_checkpointing.load({"model": model.sharded_state_dict()}, str(directory))["model"])
