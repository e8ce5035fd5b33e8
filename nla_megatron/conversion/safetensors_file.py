"""One safetensors file: its header checked without reading a weight, its tensors mapped, a new one written in place.

A file is 8 bytes (the header's length, little-endian), the header (JSON: name -> dtype, shape, offsets into the data)
and the data, without holes. The header of a file to be written is known before its first tensor.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nla_megatron.errors import CheckpointError
from nla_megatron.reading import kind_of

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHECKSUM = "xxh3_128"
BLOCK = 1 << 20  # what is summed is still in the cache when it is written
_LEAST_RUN = 16 << 10
_DAMAGED = "download or export this file again"
_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is described and not read."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def fits(self, tensor: Tensor) -> bool:
        """Whether it is this tensor, or a view of it with its rows (a vector's elements) spread over more axes."""
        if tensor.dtype != self.dtype or tensor.numel() != prod(self.shape):
            return False
        spread = tensor.dim() > len(self.shape) > 0 and tensor.shape[-1:] == self.shape[-1:]
        return tuple(tensor.shape) == self.shape or spread or (len(self.shape) == 1 < tensor.dim())


@dataclass(frozen=True)
class Placed:
    """A tensor of a file, and the byte of the file where it starts."""

    spec: TensorSpec
    start: int


def read_header(path: Path) -> dict[str, Placed]:
    """The tensors of a safetensors file, by name; only the header is read.

    Raises:
        CheckpointError: the file is cut short, is longer than its header says, or is no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == _POINTER[:8]:
            raise CheckpointError(
                f"{path}, a pointer of git-lfs", "the file that it stands for", "run `git lfs pull` there"
            )
        length = int.from_bytes(start, "little")
        if size < 8 or not 2 <= length <= size - 8:
            kind = kind_of(start + file.read(4088))
            what = f"{path} is {kind[0]}" if kind else f"{path} of {size} bytes with a header of {length}"
            raise CheckpointError(what, "a whole safetensors file", f"{kind[1]} {path}" if kind else _DAMAGED)
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        found = {name: _placed(path, name, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise CheckpointError(f"{path} with an unreadable header", "a safetensors file", _DAMAGED) from None
    end = 8 + length
    for one in sorted(found.values(), key=lambda one: (one.start, one.spec.nbytes)):
        if one.start != end:
            raise CheckpointError(
                f"{one.spec.name} at byte {one.start} of {path}", f"byte {end}, behind its neighbour", _DAMAGED
            )
        end += one.spec.nbytes
    if end != size:
        raise CheckpointError(
            f"{path} of {size} bytes", f"{end} bytes, as its header says: the file is cut short or damaged", _DAMAGED
        )
    return found


def _placed(path: Path, name: str, entry: dict, base: int) -> Placed:
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(f"{name} of dtype {entry['dtype']} in {path}", f"one of {', '.join(DTYPES)}", _DAMAGED)
    spec = TensorSpec(name, DTYPES[entry["dtype"]], tuple(entry["shape"]))
    start, stop = entry["data_offsets"]
    if stop - start != spec.nbytes:
        raise CheckpointError(
            f"{stop - start} bytes for {name} {spec.shape} {entry['dtype']} in {path}", f"{spec.nbytes}", _DAMAGED
        )
    return Placed(spec, base + start)


def mapped(path: Path, start: int, spec: TensorSpec) -> Tensor:
    """The tensor that lies at byte `start` of a file, as a map of those bytes: nothing is copied, and the memory goes
    with the tensor. Writing to it never reaches the file."""
    if spec.nbytes == 0:
        return torch.empty(spec.shape, dtype=spec.dtype)
    page = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        window = mmap.mmap(file.fileno(), start - page + spec.nbytes, access=mmap.ACCESS_COPY, offset=page)
    window.madvise(mmap.MADV_SEQUENTIAL)
    flat = torch.frombuffer(window, dtype=torch.uint8, count=spec.nbytes, offset=start - page)
    # As bytes first: torch refuses a typed view of an address that no allocator would give.
    return flat.view(spec.dtype).view(spec.shape)


def cast(tensor: Tensor, spec: TensorSpec) -> Tensor:
    """The tensor in the dtype of `spec`. Raises CheckpointError where a value would become infinite."""
    if tensor.dtype == spec.dtype:
        return tensor
    most = torch.finfo(spec.dtype).max
    if tensor.numel() and torch.finfo(tensor.dtype).max > most:
        largest = max(map(abs, map(float, tensor.aminmax())))
        if most < largest < float("inf"):
            raise CheckpointError(
                f"{largest:.6g} in {spec.name}",
                f"at most {most:.6g}, the largest {spec.dtype}",
                "choose another dtype=",
            )
    return tensor.to(spec.dtype)


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    raw: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(raw)


def runs_of(tensor: Tensor) -> Iterator[Tensor]:
    """The parts of a tensor that are contiguous in memory, in order; a copy where these would be small."""
    if tensor.is_contiguous():
        yield tensor
    elif tensor.dim() < 2 or tensor.nbytes // len(tensor) < _LEAST_RUN:
        yield tensor.contiguous()
    else:
        for part in tensor:
            yield from runs_of(part)


def hasher() -> Any:
    """The checksum of a tensor's bytes: xxh3, the only good one that costs much less than the writing itself. Its 128
    bits are against accidents, not against an adversary."""
    import xxhash

    return xxhash.xxh3_128()


def checksum(tensor: Tensor) -> str:
    """Of the bytes of a tensor in the order of its elements."""
    digest = hasher()
    for run in runs_of(tensor.cpu()):
        digest.update(as_bytes(run))
    return digest.hexdigest()


@dataclass(frozen=True)
class Shard:
    """A file to be written: its name and its tensors in order."""

    file: str
    specs: tuple[TensorSpec, ...]

    @cached_property
    def header(self) -> bytes:
        """The first bytes of the file. The data that follows is aligned to 8 bytes."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for spec in self.specs:
            entries[spec.name] = {
                "dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [at, at + spec.nbytes],
            }  # fmt: skip
            at += spec.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @cached_property
    def starts(self) -> dict[str, int]:
        """The byte of the file where each tensor starts."""
        starts, at = {}, len(self.header)
        for spec in self.specs:
            starts[spec.name] = at
            at += spec.nbytes
        return starts

    @property
    def nbytes(self) -> int:
        return len(self.header) + self.data_bytes

    @property
    def data_bytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs)


def plan_shards(specs: Sequence[TensorSpec], shard_bytes: int) -> list[Shard]:
    """Tensors in their order, in files of at most `shard_bytes` (one tensor at least), named as transformers does."""
    groups: list[list[TensorSpec]] = [[]]
    room = shard_bytes
    for spec in specs:
        if groups[-1] and spec.nbytes > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append(spec)
        room -= spec.nbytes
    if len(groups) == 1:
        return [Shard("model.safetensors", tuple(groups[0]))]
    count = len(groups)
    return [
        Shard(f"model-{number:05d}-of-{count:05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, start=1)
    ]


def index_of(shards: Sequence[Shard]) -> dict[str, object]:
    """What the index file of several shards says."""
    return {
        "metadata": {
            "total_parameters": sum(prod(spec.shape) for shard in shards for spec in shard.specs),
            "total_size": sum(shard.data_bytes for shard in shards),
        },
        "weight_map": dict(sorted((spec.name, shard.file) for shard in shards for spec in shard.specs)),
    }


class ShardFile:
    """A shard under way: made at its full length, each tensor written at its place, in any order."""

    def __init__(self, directory: Path, shard: Shard):
        self.shard, self.path = shard, directory / shard.file
        self._specs = {spec.name: spec for spec in shard.specs}
        self._file = self.path.open("wb")
        self._file.write(shard.header)

    def write(self, name: str, tensor: Tensor) -> str:
        """Put a tensor in its place; returns its checksum. A strided view is written run by run, without a copy.

        Raises AssertionError for a tensor that is not the planned one: every caller casts and checks before.
        """
        spec = self._specs.pop(name)
        assert spec.fits(tensor), f"{name}: {tensor.dtype} {tuple(tensor.shape)} is not {spec}"
        self._file.seek(self.shard.starts[name])
        digest = hasher()
        for run in runs_of(tensor.cpu()):
            data = as_bytes(run)
            for start in range(0, len(data), BLOCK):
                block = data[start : start + BLOCK]
                digest.update(block)
                self._file.write(block)
        return digest.hexdigest()

    def missing(self) -> list[str]:
        """Tensors that are not written yet."""
        return list(self._specs)

    def close(self) -> None:
        self._file.close()
