"""Reading and writing Hugging Face directories: configuration, safetensors shards with their index, tokenizer files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nla_megatron.conversion.families import family_of
from nla_megatron.errors import CheckpointError, MissingFile
from nla_megatron.types import ModelShape

INDEX = "model.safetensors.index.json"
VALUE_HEAD = "value_head.safetensors"
_NOT_WEIGHTS = ("*.json", "*.model", "*.txt", "*.jinja")


def read_config(directory: str | Path) -> dict[str, Any]:
    """config.json of a Hugging Face directory. Raises MissingFile."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise MissingFile(
            f"no {path}", "a Hugging Face model directory", "give the path of a directory with config.json"
        )
    return json.loads(path.read_text())


def read_shape(directory: str | Path) -> ModelShape:
    """The shape of the model in a Hugging Face directory. Raises MissingFile, UnsupportedModel."""
    config = read_config(directory)
    return family_of(config).shape_from_config(config)


class SafetensorsReader:
    """Slices of the tensors of a Hugging Face directory; only the asked bytes are read."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self._file_of = self._locate()
        self._open: dict[str, Any] = {}

    def _locate(self) -> dict[str, str]:
        from safetensors import safe_open

        index = self.directory / INDEX
        if index.is_file():
            return json.loads(index.read_text())["weight_map"]
        files = [path for path in sorted(self.directory.glob("*.safetensors")) if path.name != VALUE_HEAD]
        if not files:
            raise MissingFile(
                f"no *.safetensors in {self.directory}", "a Hugging Face checkpoint", "export it as safetensors"
            )
        names = {}
        for path in files:
            with safe_open(path, "pt") as handle:
                names.update(dict.fromkeys(handle.keys(), path.name))
        return names

    def names(self) -> set[str]:
        return set(self._file_of)

    def _handle(self, name: str) -> Any:
        from safetensors import safe_open

        if name not in self._file_of:
            raise CheckpointError(
                f"no tensor {name!r} in {self.directory}", "a complete checkpoint", "download or export it again"
            )
        file = self._file_of[name]
        if file not in self._open:
            path = self.directory / file
            if not path.is_file():
                raise MissingFile(f"no {path}", f"the shard that {INDEX} names", "download the missing shard")
            self._open[file] = safe_open(path, "pt")
        return self._open[file]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handle(name).get_slice(name).get_shape())

    def read(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """`tensor[start:stop]` along `axis` (0 or 1)."""
        window = self._handle(name).get_slice(name)
        return window[start:stop] if axis == 0 else window[:, start:stop]


def read_value_head(directory: str | Path) -> Tensor | None:
    """The AR's (d, d) head; None in a directory that has none."""
    from safetensors.torch import load_file

    path = Path(directory) / VALUE_HEAD
    return load_file(path)["weight"] if path.is_file() else None


def write_value_head(directory: Path, weight: Tensor) -> None:
    from safetensors.torch import save_file

    save_file({"weight": weight.detach().float().cpu().contiguous()}, directory / VALUE_HEAD, metadata={"format": "pt"})


def write_shards(directory: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = 5 << 30) -> None:
    """Write tensors in order into shards of at most `shard_bytes` (one tensor at least), with an index if several."""
    from safetensors.torch import save_file

    shards: list[dict[str, str]] = []
    pending: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        nonlocal pending, size
        file = f"model-{len(shards) + 1:05d}.safetensors"
        save_file(pending, directory / file, metadata={"format": "pt"})
        shards.append(dict.fromkeys(pending, file))
        pending, size = {}, 0

    for name, tensor in tensors:
        if pending and size + tensor.nbytes > shard_bytes:
            flush()
        pending[name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        (directory / "model-00001.safetensors").rename(directory / "model.safetensors")
        return
    weight_map = {name: file for shard in shards for name, file in shard.items()}
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1))


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
            if path.name not in ("config.json", INDEX):
                shutil.copyfile(path, target / path.name)
    written = {key: value for key, value in config.items() if key != "torch_dtype"}
    (target / "config.json").write_text(
        json.dumps({**written, "dtype": str(dtype).removeprefix("torch.")}, indent=2) + "\n"
    )
