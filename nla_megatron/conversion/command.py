"""`convert`: a Hugging Face directory to a megatron-core distributed checkpoint, back, and whether both are the same.

A conversion needs no model in memory and no parallel layout, because the distributed format has none: the ranks of
this command are workers that share files out among them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from megatron.core import parallel_state

from nla_megatron.config.schema import ConvertConfig
from nla_megatron.config.unread import Unread
from nla_megatron.conversion.description import described, located
from nla_megatron.conversion.exporting import Export
from nla_megatron.conversion.importing import Import
from nla_megatron.conversion.outputs import TOLERANCE, Outputs, compare_outputs
from nla_megatron.conversion.safetensors_file import DTYPES
from nla_megatron.conversion.source import HuggingFaceSide
from nla_megatron.conversion.verify import (
    Difference,
    compare_configurations,
    compare_weights,
    is_torch_dist,
    rounded,
    sides,
    table,
)
from nla_megatron.errors import ConfigError, ConversionMismatch, MissingFile
from nla_megatron.models.builder import check_layout
from nla_megatron.parallel.world import World, data_parallel_size, initialise

_NEEDS = {"import": ("hf", "out"), "export": ("checkpoint", "out"), "verify": ("hf", "checkpoint")}
_ALL = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


def check(config: ConvertConfig, world_size: int) -> None:
    """Everything that can be known without building a plan; raises a named error."""
    for key in _NEEDS[config.direction]:
        if not getattr(config, key):
            raise ConfigError(f"no {key}=", f"{' and '.join(_NEEDS[config.direction])} for {config.direction}",
                              f"add {key}=...")  # fmt: skip
    if config.layers is not None and config.direction != "import":
        raise ConfigError(f"layers={config.layers} for {config.direction}", "an import", "leave out layers=")
    if config.direction == "import":
        _import(config)
    elif config.direction == "export":
        located(Path(config.checkpoint), Path(config.hf) if config.hf else None)
    else:
        _check_verify(config, world_size)


def unread(config: ConvertConfig) -> Iterator[Unread]:
    """What this conversion does not read."""
    keys = ("shard_size", "processes") if config.direction == "verify" else ("text", "logits")
    yield from ((key, f"in convert {config.direction}") for key in (*keys, "disk_rate"))


def _check_verify(config: ConvertConfig, world_size: int) -> None:
    if config.dtype is not None and config.dtype not in TOLERANCE:
        raise ConfigError(f"dtype={config.dtype!r} for verify", f"one of {', '.join(TOLERANCE)}", "change dtype=")
    if not Path(config.checkpoint).is_dir():
        raise MissingFile(f"no directory {config.checkpoint}", "a checkpoint or a Hugging Face directory",
                          "correct checkpoint=")  # fmt: skip
    HuggingFaceSide(config.hf)
    if not is_torch_dist(config.checkpoint):
        HuggingFaceSide(config.checkpoint)
    if config.logits:
        data_parallel_size(config.parallel, world_size)
        check_layout(described(Path(config.hf), None, is_ar=False).shape, config.parallel, "forward")


def _import(config: ConvertConfig) -> Import:
    dtype = _ALL[config.dtype] if config.dtype else None
    return Import(config.hf, config.out, dtype=dtype, layers=config.layers, shard_bytes=config.shard_bytes)


def run(config: ConvertConfig, world: World) -> None:
    if config.direction == "verify":
        verify(config, world)
        return
    conversion: Import | Export
    if config.direction == "import":
        conversion = _import(config)
    else:
        dtype = _ALL[config.dtype] if config.dtype else None
        conversion = Export(
            config.checkpoint, config.hf or None, config.out, world, dtype=dtype, shard_bytes=config.shard_bytes
        )
    if not conversion.finished:
        conversion.run(world)
    elif world.is_main:
        print(f"{config.out} is finished already", file=sys.stderr)


def verify(config: ConvertConfig, world: World) -> None:
    """Print what differs. Raises ConversionMismatch, on all ranks, if anything does."""
    one, other = sides(config.hf, config.checkpoint, world)
    settings = compare_configurations(one, other)
    count, differences = compare_weights(one, other, world)
    if world.is_main:
        same, other_dtype = count - len({found.tensor for found in differences}), rounded(one, other, differences)
        told = f", {other_dtype} of them rounded to another dtype" if other_dtype else ""
        print(f"weights: {same} of {count} tensors are the same{told}")
        if settings or differences:
            print(table([*settings, *differences]))
    outputs = None
    if config.logits and not any(found.what in ("only on one side", "another shape") for found in differences):
        parallel_state.destroy_model_parallel()
        world = initialise(config.parallel)
        outputs = compare_outputs(one, other, world, config.text, config.dtype or "float32")
        if world.is_main:
            print(_told(outputs, other.model.is_ar, world))
    _conclude(config, settings, differences, outputs)


def _told(outputs: Outputs, is_ar: bool, world: World) -> str:
    what = "the AR's vector" if is_ar else "logits"
    return (
        f"{what} of {outputs.tokens} tokens in {outputs.dtype} ({world.layout()}), against transformers: "
        f"{outputs.apart:.3g} apart at most, of {outputs.scale:.3g}: {'the same' if outputs.same else 'they differ'}"
    )


def _conclude(
    config: ConvertConfig, settings: list[Difference], differences: list[Difference], outputs: Outputs | None
) -> None:
    if settings or differences or (outputs is not None and not outputs.same):
        tensors = len({found.tensor for found in differences})
        raise ConversionMismatch(
            f"{config.checkpoint} differs from {config.hf} in {tensors} tensors"
            + (f", {len(settings)} values of config.json" if settings else "")
            + ("" if outputs is None or outputs.same else " and in what it computes"),
            "the same model", "see the table above",
        )  # fmt: skip
