"""What a conversion is about, from config.json alone: the model, its tensors, the files that they are shared out to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch

from nla_megatron.conversion.families import family_of, rules_of
from nla_megatron.conversion.hf import (
    SafetensorsReader,
    check_tensors,
    check_vocabulary,
    read_config,
    read_json,
    read_shape,
    truncated_config,
)
from nla_megatron.conversion.rules import Rule
from nla_megatron.conversion.safetensors_file import TensorSpec
from nla_megatron.errors import ConfigError, MissingFile
from nla_megatron.types import ModelShape

WEIGHTS = "weights"
HEAD = "value_head.weight"
SIDECAR = "nla_meta.yaml"
# Enough files for workers to share, few enough to handle.
_FILES, _LEAST_FILE_BYTES = 64, 64 << 20


@dataclass(frozen=True)
class Model:
    """A model to convert: what its configuration says of it.

    `config` is config.json as the result will have it; `layers` was asked for, None for the model's own depth.
    """

    directory: Path
    config: Mapping[str, Any]
    shape: ModelShape
    is_ar: bool

    @cached_property
    def rules(self) -> list[Rule]:
        """Each Hugging Face tensor once."""
        return [rule for rule in rules_of(self.shape, with_head=not self.is_ar) if not rule.alias]

    def specs(self, dtypes: Mapping[str, torch.dtype]) -> list[TensorSpec]:
        """The Hugging Face tensors in the table's order; `dtypes` by Megatron's names."""
        return [
            TensorSpec(part.hf, dtypes[rule.megatron], rule.hf_shape(part))
            for rule in self.rules
            for part in rule.parts
        ]


def described(directory: Path, layers: int | None, is_ar: bool) -> Model:
    """The model of a config.json, cut to `layers` blocks where that is asked for. Raises ConfigError."""
    config = read_config(directory)
    shape = family_of(config).shape_from_config(config)
    if layers is not None and not 1 <= layers <= shape.num_layers:
        raise ConfigError(f"layers={layers}", f"1 to {shape.num_layers}, the blocks of {directory}", "change layers=")
    if layers is None or layers == shape.num_layers:
        return Model(directory, config, shape, is_ar)
    cut = truncated_config(config, layers)
    return Model(directory, cut, family_of(cut).shape_from_config(cut), is_ar)


def checked_weights(directory: str | Path, shape: ModelShape, *, with_head: bool) -> SafetensorsReader:
    """The weights of a directory, after a look at their headers: those of `shape` are there, and nothing is beside them
    that its config.json does not speak of.

    Args:
        shape: of the directory's model, or of its first blocks.
        with_head: with final norm and output layer, which may be there in any case.

    Raises:
        MissingFile, CheckpointError: see `SafetensorsReader` and `check_tensors`.
    """
    reader = SafetensorsReader(directory)
    wanted = [
        TensorSpec(part.hf, torch.float32, rule.hf_shape(part))
        for rule in rules_of(shape, with_head)
        for part in rule.parts
    ]
    check_tensors(reader, wanted, places_of(directory))
    return reader


def places_of(directory: str | Path) -> set[str]:
    """The names of all tensors for which the model of a config.json has a place; tied embeddings may be there twice."""
    rules = rules_of(read_shape(directory), with_head=True)
    return {"lm_head.weight", *(part.hf for rule in rules for part in rule.parts)}


def check_directory(directory: str | Path, shape: ModelShape, *, with_head: bool = True) -> None:
    """Everything about a model's directory that can be known without reading a weight.

    Raises:
        MissingFile, CheckpointError: as `checked_weights`, or a tokenizer with ids that the model has no row for.
    """
    checked_weights(directory, shape, with_head=with_head)
    check_vocabulary(Path(directory), shape.vocab_size)


def parameter_bytes(model: Model, dtypes: Mapping[str, torch.dtype]) -> dict[str, int]:
    """What each of Megatron's parameters takes, padding aside; an AR's head is fp32 whatever the others are."""
    sizes = {
        rule.megatron: sum(prod(rule.hf_shape(part)) for part in rule.parts) * dtypes[rule.megatron].itemsize
        for rule in model.rules
    }
    return {**sizes, HEAD: model.shape.hidden_size**2 * torch.float32.itemsize} if model.is_ar else sizes


def checkpoint_files(model: Model, dtypes: Mapping[str, torch.dtype], shard_bytes: int) -> list[list[str]]:
    """Megatron's parameters, in order, in files of like size: a function of the model alone, not of the workers."""
    sizes = parameter_bytes(model, dtypes)
    limit = min(shard_bytes, max(_LEAST_FILE_BYTES, -(-sum(sizes.values()) // _FILES)))
    files: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if files[-1] and size > room:
            files.append([])
            room = limit
        files[-1].append(name)
        room -= size
    return files


def located(directory: Path, companions: Path | None) -> tuple[Path, Path]:
    """The checkpoint itself, and the directory of its config.json. Raises MissingFile."""
    weights = directory if is_checkpoint(directory) else directory / WEIGHTS
    if not is_checkpoint(weights):
        inside = sorted(path.parent.name for path in directory.glob("*/metadata.json"))
        raise MissingFile(
            f"no checkpoint in {directory} or in {directory / WEIGHTS}",
            "a megatron-core distributed checkpoint (torch_dist)",
            f"give one of those inside: {', '.join(inside)}" if inside else "check checkpoint=",
        )
    if companions is not None:
        return weights, companions
    for candidate in (directory, weights.parent):
        if (candidate / "config.json").is_file():
            return weights, candidate
    raise MissingFile(
        f"no config.json beside {weights}", "the model's Hugging Face configuration and tokenizer",
        "give the directory of its base model with hf=",
    )  # fmt: skip


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory is a megatron-core distributed checkpoint of this format."""
    config = directory / "metadata.json"
    return config.is_file() and read_json(config).get("sharded_backend") == "torch_dist"
