"""A conversion on paper: files, bytes, memory and time from config.json alone. Nothing is read but that, nothing is
written, and megatron-core is not needed."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from nla_megatron.config.schema import ConvertConfig
from nla_megatron.conversion.description import HEAD, Model, checkpoint_files, described, located, parameter_bytes
from nla_megatron.conversion.hf import VALUE_HEAD
from nla_megatron.conversion.manifest import read_manifest
from nla_megatron.conversion.rules import Rule
from nla_megatron.conversion.safetensors_file import plan_shards
from nla_megatron.disk import size
from nla_megatron.errors import ConfigError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Estimate:
    """What a conversion will take; bytes, and seconds at the given rate of the disk.

    `peak_bytes`: of tensors, in one worker. `bytes_per_worker`: written by the busiest.
    """

    parameters: int
    tensors: int
    read_bytes: int
    written_bytes: int
    files: int
    workers: int
    bytes_per_worker: int
    largest_tensor_bytes: int
    peak_bytes: int
    seconds: float


def estimate(config: ConvertConfig) -> Estimate:
    """Raises MissingFile, UnsupportedModel or ConfigError for what cannot be converted at all."""
    if config.direction == "verify":
        raise ConfigError("dry_run with direction=verify", "an import or an export", "leave out --dry-run")
    model = _model(config)
    source = _dtype(model)
    target = _DTYPES[config.dtype] if config.dtype else source
    dtypes = {rule.megatron: target for rule in model.rules}
    specs = model.specs(dtypes)
    if config.direction == "import":
        each = parameter_bytes(model, dtypes)
        files = checkpoint_files(model, dtypes, config.shard_bytes)
        sizes = [sum(each[name] for name in file) for file in files]
    else:
        sizes = [shard.nbytes for shard in plan_shards(specs, config.shard_bytes)]
        sizes += [model.shape.hidden_size**2 * torch.float32.itemsize] if model.is_ar else []
    elements = sum(map(elements_of, model.rules))
    read, written = elements * source.itemsize, sum(sizes)
    workers = config.processes or config.parallel.tp * config.parallel.pp * (config.parallel.dp or 1)
    return Estimate(
        parameters=elements,
        tensors=len(specs),
        read_bytes=read,
        written_bytes=written,
        files=len(sizes),
        workers=workers,
        bytes_per_worker=max(sum(sizes[worker::workers]) for worker in range(workers)),
        largest_tensor_bytes=max(spec.nbytes for spec in specs),
        peak_bytes=max(_peak(rule, config.direction, source, target) for rule in model.rules),
        seconds=(read + written) / (config.disk_rate * 1e9),
    )


def _model(config: ConvertConfig) -> Model:
    if config.direction == "import":
        source = Path(_given(config, "hf"))
        is_ar = config.layers is not None or (source / VALUE_HEAD).is_file()
        return described(source, config.layers, is_ar)
    if config.hf:
        return described(Path(config.hf), config.layers, is_ar=False)
    directory = located(Path(_given(config, "checkpoint")), None)[1]
    told = read_manifest(directory) or {"tensors": {}}
    return described(directory, None, is_ar=HEAD in told["tensors"])


def _given(config: ConvertConfig, key: str) -> str:
    value = str(getattr(config, key))
    if not value:
        raise ConfigError(f"no {key}= for an {config.direction}", "the directory that is converted", f"add {key}=...")
    return value


def _dtype(model: Model) -> torch.dtype:
    """What config.json says the weights are; transformers writes it since its first versions."""
    name = str(model.config.get("dtype") or model.config.get("torch_dtype") or "float32")
    return _DTYPES.get(name.removeprefix("torch."), torch.float32)


def elements_of(rule: Rule) -> int:
    return sum(prod(rule.hf_shape(part)) for part in rule.parts)


def _peak(rule: Rule, direction: str, source: torch.dtype, target: torch.dtype) -> int:
    """Bytes of tensors while one parameter passes through: maps of what is read, and what is cast."""
    # An import maps the parts of a parameter together, an export one after the other where each is a run of it.
    whole = direction == "import" or rule.slot_axis not in (None, 0)
    elements = elements_of(rule) if whole else max(prod(rule.hf_shape(part)) for part in rule.parts)
    return elements * (source.itemsize + (target.itemsize if source != target else 0))


def run(config: ConvertConfig) -> None:
    """Print the estimate."""
    told, model = estimate(config), _model(config)
    kind = f"an AR of {model.shape.num_layers} blocks" if model.is_ar else f"{model.shape.num_layers} blocks"
    print(f"{config.direction} of a {model.shape.family} with {kind}, {told.parameters / 1e9:.2f} B parameters")
    for name, value in (
        ("Hugging Face tensors", f"{told.tensors:,}, the largest {size(told.largest_tensor_bytes)}"),
        ("read", size(told.read_bytes)),
        ("written", f"{size(told.written_bytes)} in {told.files} files"),
        ("per worker", f"{size(told.bytes_per_worker)} (of {told.workers})"),
        ("peak memory", f"{size(told.peak_bytes)} of tensors in each worker"),
        ("time", f"{told.seconds:,.0f} s of reading and writing at {config.disk_rate:g} GB/s"),
    ):
        print(f"  {name:<22}{value}")
