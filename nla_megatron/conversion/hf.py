"""Reading and writing Hugging Face directories: configuration, safetensors shards with their index, tokenizer files."""

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
from nla_megatron.conversion.safetensors_file import (
    Placed,
    Shard,
    ShardFile,
    TensorSpec,
    index_of,
    mapped,
    plan_shards,
    read_header,
)
from nla_megatron.errors import CheckpointError, MissingFile
from nla_megatron.reading import read_object
from nla_megatron.types import ModelShape

INDEX = "model.safetensors.index.json"
VALUE_HEAD = "value_head.safetensors"
HEAD_FILE = "reconstructor_head.safetensors"
"""The head of an AR that other trainers would not read as it is meant; `conversion.heads`."""
MANIFEST = "conversion.json"
SHARD_BYTES = 5_000_000_000
_NOT_WEIGHTS = ("*.json", "*.model", "*.txt", "*.jinja")
# Written by others beside the weights that a directory's index or model.safetensors holds.
_NOT_OURS = (VALUE_HEAD, HEAD_FILE, "adapter_model.safetensors", "consolidated")


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object. Raises CheckpointError where it is damaged."""
    return read_object(path, CheckpointError, "download or write this file again")


def read_config(directory: str | Path) -> dict[str, Any]:
    """config.json of a Hugging Face directory. Raises MissingFile, CheckpointError."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise MissingFile(
            f"no {path}", "a Hugging Face model directory", "give the path of a directory with config.json"
        )
    return read_json(path)


def read_shape(directory: str | Path) -> ModelShape:
    """The shape of the model in a Hugging Face directory. Raises MissingFile, UnsupportedModel."""
    config = read_config(directory)
    return family_of(config).shape_from_config(config)


class SafetensorsReader:
    """The tensors of a Hugging Face directory; only the asked bytes are read.

    Raises:
        MissingFile: there is no checkpoint, or a shard that the index names is not there.
        CheckpointError: a file is damaged, or index and shards disagree. Only headers are read to know it.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self._files: dict[str, Path] = {}
        self._placed: dict[str, Placed] = {}
        index = self.directory / INDEX
        if index.is_file():
            self._read_indexed(_weight_map(index))
        else:
            self._read_all()

    def _read_indexed(self, file_of: dict[str, str]) -> None:
        for file in sorted(set(file_of.values())):
            path = self.directory / file
            if not path.is_file():
                raise MissingFile(f"no {path}", f"the shard that {INDEX} names", "download the missing shard")
            self._add(path)
        for name, file in file_of.items():
            if name not in self._placed or self._files[name].name != file:
                raise CheckpointError(
                    f"{INDEX} of {self.directory} with {name!r} in {file}",
                    f"{self._files[name].name if name in self._files else 'a shard'} with that tensor",
                    "download the index and the shards of one version",
                )
        if extra := sorted(set(self._placed) - set(file_of)):
            raise CheckpointError(
                f"{len(extra)} tensors in {self.directory} that {INDEX} does not name, first {extra[0]!r}",
                "an index of every tensor", "download the index and the shards of one version",
            )  # fmt: skip

    def _read_all(self) -> None:
        for path in sorted(self.directory.glob("*.safetensors")):
            if not path.name.startswith(_NOT_OURS):
                self._add(path)
        if not self._placed:
            raise MissingFile(
                f"no *.safetensors in {self.directory}", "a Hugging Face checkpoint", "export it as safetensors"
            )

    def _add(self, path: Path) -> None:
        for name, placed in read_header(path).items():
            if name in self._placed:
                raise CheckpointError(
                    f"{name} in {self._files[name]} and in {path}", "each tensor once", "keep one of the two files"
                )
            self._placed[name], self._files[name] = placed, path

    def names(self) -> set[str]:
        return set(self._placed)

    def spec(self, name: str) -> TensorSpec:
        if name not in self._placed:
            raise CheckpointError(
                f"no tensor {name!r} in {self.directory}", "a complete checkpoint", "download or export it again"
            )
        return self._placed[name].spec

    def shape(self, name: str) -> tuple[int, ...]:
        return self.spec(name).shape

    def read(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """`tensor[start:stop]` along `axis` (0 or 1): a map of the file, not a copy."""
        spec = self.spec(name)
        if axis == 0 and spec.shape:
            row = spec.nbytes // max(spec.shape[0], 1)
            stop = min(stop, spec.shape[0])
            rows = TensorSpec(name, spec.dtype, (max(stop - start, 0), *spec.shape[1:]))
            return mapped(self._files[name], self._placed[name].start + start * row, rows)
        whole = mapped(self._files[name], self._placed[name].start, spec)
        return whole[:, start:stop] if spec.shape else whole

    def whole(self, name: str) -> Tensor:
        """A tensor as a map of its file."""
        return mapped(self._files[name], self._placed[name].start, self.spec(name))


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise CheckpointError(f"{index} without a weight_map", "tensors and their files", "download the index again")
    return found


def check_tied(reader: SafetensorsReader) -> None:
    """Raises CheckpointError where a checkpoint of tied embeddings has another output layer of its own."""
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    if head not in reader.names():
        return
    pieces = (reader.whole(name).reshape(-1).split(1 << 24) for name in (embedding, head))
    same = reader.shape(embedding) == reader.shape(head) and all(
        torch.equal(one.float(), other.float()) for one, other in zip(*pieces, strict=True)
    )
    if not same:
        raise CheckpointError(
            f"{head} in {reader.directory}, other than {embedding}, with tie_word_embeddings in config.json",
            "one tensor for both", "set tie_word_embeddings to false, or remove the one that the model does not use",
        )  # fmt: skip


def check_tensors(reader: SafetensorsReader, expected: Iterable[TensorSpec], optional: Iterable[str] = ()) -> None:
    """Raises CheckpointError unless the directory holds exactly `expected`, in their shapes, and some of `optional`."""
    specs = {spec.name: spec for spec in expected}
    remedy = "check that config.json belongs to these weights"
    if extra := sorted(reader.names() - set(specs) - set(optional)):
        raise CheckpointError(
            f"{len(extra)} tensors in {reader.directory} that the model has no place for, first {extra[0]!r}",
            "exactly the tensors of its config.json", remedy,
        )  # fmt: skip
    for name, spec in specs.items():
        found = reader.spec(name)
        if found.shape != spec.shape:
            raise CheckpointError(f"{name} of shape {found.shape} in {reader.directory}", f"shape {spec.shape}", remedy)
        if found.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise CheckpointError(
                f"{name} of dtype {found.dtype} in {reader.directory}",
                "float32, bfloat16, float16 or float64: quantised weights are not converted",
                "take the original of the checkpoint",
            )


def check_vocabulary(directory: Path, vocab_size: int) -> None:
    """Raises CheckpointError where the tokenizer knows ids that the model has no row for.

    Placeholders of other modalities are never fed to a text model; tokenizers shared with a multimodal one have them.
    """
    unused = _placeholders(directory)
    for file, ids_of in (("tokenizer.json", _fast_ids), ("vocab.json", dict), ("added_tokens.json", dict)):
        path = directory / file
        if not path.is_file():
            continue
        try:
            ids = ids_of(read_json(path))
            largest = max((number for token, number in ids.items() if token not in unused), default=0)
        except (AttributeError, KeyError, TypeError):
            raise CheckpointError(f"{path} without tokens and ids", "a tokenizer's file", "download it again") from None
        if largest >= vocab_size:
            raise CheckpointError(
                f"token id {largest} in {path}", f"ids below the model's vocabulary of {vocab_size}",
                "take the model's own tokenizer, or resize the model's embedding to the tokenizer",
            )  # fmt: skip


def _fast_ids(tokenizer: dict[str, Any]) -> dict[str, int]:
    """Tokens and ids of a tokenizer.json; unigram models number their tokens by their places."""
    vocabulary = tokenizer["model"].get("vocab", ())
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {one[0]: at for at, one in enumerate(vocabulary)}
    return ids | {one["content"]: one["id"] for one in tokenizer.get("added_tokens", ())}


def _placeholders(directory: Path) -> set[str]:
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return set()
    config = read_json(path)
    extra = config.get("extra_special_tokens")
    named = {**config, **(extra if isinstance(extra, dict) else {})}
    return {str(named[key]) for key in ("image_token", "audio_token", "video_token") if key in named}


def read_value_head(directory: str | Path) -> Tensor | None:
    """The AR's (d, d) head; None in a directory that has none."""
    from safetensors.torch import load_file

    path = Path(directory) / VALUE_HEAD
    return load_file(path)["weight"] if path.is_file() else None


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
