"""Hugging Face directories: the shape of the model in one, and writing weights, heads and what goes along with them.

What a directory holds is decided in `conversion.formats`, whose readers are named here too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nla_megatron.contract.files import atomic_path
from nla_megatron.conversion.families import family_of
from nla_megatron.conversion.formats.config_file import read_config
from nla_megatron.conversion.formats.json_file import read_json
from nla_megatron.conversion.formats.token_ids import check_vocabulary
from nla_megatron.conversion.formats.weights import (
    HEAD_FILE,
    INDEX,
    VALUE_HEAD,
    SafetensorsReader,
    check_tensors,
    check_tied,
    finite_tensors,
)
from nla_megatron.conversion.safetensors_file import Shard, ShardFile, TensorSpec, index_of, plan_shards
from nla_megatron.errors import CheckpointError
from nla_megatron.types import ModelShape

__all__ = [
    "HEAD_FILE", "INDEX", "MANIFEST", "SHARD_BYTES", "VALUE_HEAD", "SafetensorsReader", "check_tensors", "check_tied",
    "check_vocabulary", "copy_companions", "read_config", "read_json", "read_shape", "read_value_head",
    "truncated_config", "write_head", "write_index", "write_shards", "write_value_head",
]  # fmt: skip

MANIFEST = "conversion.json"
SHARD_BYTES = 5_000_000_000
_NOT_WEIGHTS = ("*.json", "*.model", "*.txt", "*.jinja")


def read_shape(directory: str | Path) -> ModelShape:
    """The shape of the model in a Hugging Face directory. Raises MissingFile, UnsupportedModel."""
    config = read_config(directory)
    return family_of(config).shape_from_config(config)


def read_value_head(directory: str | Path) -> Tensor | None:
    """The AR's (d, d) head; None in a directory that has none. Raises CheckpointError."""
    path = Path(directory) / VALUE_HEAD
    if not path.is_file():
        return None
    tensors = finite_tensors(path)
    if list(tensors) != ["weight"]:
        found = f"{path} with tensors {', '.join(tensors) or 'none'}"
        raise CheckpointError(found, "the one tensor `weight` of an AR's head", "copy the AR again")
    return tensors["weight"]


def write_value_head(directory: Path, weight: Tensor) -> None:
    write_head(directory / VALUE_HEAD, {"weight": weight})


def write_head(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """The fp32 tensors of an AR's head."""
    specs = tuple(TensorSpec(name, torch.float32, tuple(tensor.shape)) for name, tensor in tensors.items())
    # A new file: the one before may be another directory's too, by a hard link.
    with atomic_path(file) as path:
        shard = ShardFile(path.parent, Shard(path.name, specs))
        for name, tensor in tensors.items():
            shard.write(name, tensor.detach().float().cpu().contiguous())
        shard.close()


def write_shards(
    directory: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES,
    specs: Sequence[TensorSpec] | None = None,
) -> None:  # fmt: skip
    """Write tensors in order into shards of at most `shard_bytes`, with an index if there are several.

    Args:
        specs: the tensors that will come, in order: then one of them at a time is in memory. Without it they are
            collected first.
    """
    if specs is None:
        tensors = list(tensors)
        specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors]
    shards, stream = plan_shards(specs, shard_bytes), iter(tensors)
    for shard in shards:
        file = ShardFile(directory, shard)
        for _ in shard.specs:
            file.write(*next(stream))
        file.close()
        assert not file.missing(), f"a tensor of {shard.file} came twice"
    write_index(directory, shards)


def write_index(directory: Path, shards: Sequence[Shard]) -> None:
    """The index of several shards; a single one needs none."""
    if len(shards) > 1:
        (directory / INDEX).write_text(json.dumps(index_of(shards), indent=2) + "\n")


def truncated_config(config: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """config.json of the first blocks of a model: every per-layer list is cut with the layer count."""
    full = config["num_hidden_layers"]
    cut = {key: value[:num_layers] if _is_per_layer(key, value, full) else value for key, value in config.items()}
    if isinstance(cut.get("max_window_layers"), int):
        cut["max_window_layers"] = min(cut["max_window_layers"], num_layers)
    return {**cut, "num_hidden_layers": num_layers}


def _is_per_layer(key: str, value: Any, num_layers: int) -> bool:
    # Lists of something else can be as long as a small model is deep.
    return isinstance(value, list) and len(value) == num_layers and key not in ("architectures", "eos_token_id")


def copy_companions(source: Path, target: Path, config: dict[str, Any], dtype: torch.dtype) -> None:
    """The tokenizer and generation files of `source`, and `config` with the weights' dtype."""
    for pattern in _NOT_WEIGHTS:
        for path in source.glob(pattern):
            if path.name not in ("config.json", INDEX, MANIFEST):
                shutil.copyfile(path, target / path.name)
    written = {key: value for key, value in config.items() if key != "torch_dtype"}
    (target / "config.json").write_text(
        json.dumps({**written, "dtype": str(dtype).removeprefix("torch.")}, indent=2) + "\n"
    )
