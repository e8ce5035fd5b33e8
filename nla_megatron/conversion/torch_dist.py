"""Writing a `torch_dist` checkpoint file by file, as megatron-core's own `dist_checkpointing.save` would leave it.

__N_0.distcp    chunks of tensors, each as torch.save writes it, and serialized objects
.metadata       which chunk lies where: pickled classes of torch.distributed.checkpoint
common.pt       what is not sharded: nothing
metadata.json   the format's name and version
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from math import prod
from mmap import mmap
from pathlib import Path
from typing import Any
from zipfile import ZipFile, ZipInfo

import torch
from torch import Tensor
from torch.serialization import get_crc32_options, set_crc32_options

from nla_megatron.conversion.checkpoint_plan import Chunk
from nla_megatron.conversion.safetensors_file import BLOCK, as_bytes

METADATA = ".metadata"
_ALIGNMENT = 64
_SMALL = 64 << 10


@dataclass(frozen=True)
class Run:
    """Elements that lie one behind the other; `digest` sums them while they are written, if it is there."""

    elements: Tensor
    digest: Any = None


@dataclass(frozen=True)
class Written:
    """An entry of a checkpoint file. `offsets` and `sizes` are None for an object."""

    key: str
    offsets: tuple[int, ...] | None
    sizes: tuple[int, ...] | None
    dtype: str
    file: str
    start: int
    length: int


def file_name(number: int) -> str:
    return f"__{number}_0.distcp"


class CheckpointFile:
    """One file of a checkpoint under way. Elements go from where they are mapped to the file, without a copy."""

    def __init__(self, directory: Path, file: str):
        self.file, self.entries = file, list[Written]()
        self._stream = (directory / file).open("wb")

    def write_object(self, key: str, data: bytes) -> None:
        start = self._stream.tell()
        self._stream.write(data)
        self.entries.append(Written(key, None, None, "", self.file, start, len(data)))

    def write_chunk(self, chunk: Chunk, dtype: torch.dtype, runs: Iterable[Run]) -> None:
        """`runs`: the chunk's elements, in order."""
        self._stream.write(b"\0" * (-self._stream.tell() % _ALIGNMENT))
        start = self._stream.tell()
        before, behind = _envelope(dtype, chunk.sizes)
        self._stream.write(before)
        for run in runs:
            data = as_bytes(run.elements)
            for at in range(0, len(data), BLOCK):
                block = data[at : at + BLOCK]
                if run.digest is not None:
                    run.digest.update(block)
                self._stream.write(block)
        self._stream.write(behind)
        length = self._stream.tell() - start
        assert length == len(before) + len(behind) + chunk.numel * dtype.itemsize, f"{chunk.key}: {length} bytes"
        told = str(dtype).removeprefix("torch.")
        self.entries.append(Written(chunk.key, chunk.offsets, chunk.sizes, told, self.file, start, length))

    def close(self) -> None:
        self._stream.close()


@lru_cache
def _envelope(dtype: torch.dtype, sizes: tuple[int, ...]) -> tuple[bytes, bytes]:
    """What torch.save writes before and behind the elements of a tensor, which do not change it.

    The archive's own sum is left out: it is slow, and nobody checks it. The manifest has a better one.
    """
    summed = get_crc32_options()
    set_crc32_options(False)
    try:
        around = _Around(prod(sizes) * dtype.itemsize)
        torch.save(torch.empty(sizes, dtype=dtype), around)  # type: ignore[arg-type]
    finally:
        set_crc32_options(summed)
    return around.split()


class _Around:
    """A file that forgets the elements of the tensor that is saved to it."""

    def __init__(self, nbytes: int):
        self._nbytes, self._pieces = nbytes, list[bytes]()

    def write(self, data: memoryview) -> int:
        # A tensor's elements come in one piece; those of a small one are kept, and found by the archive's directory.
        self._pieces.append(b"" if len(data) == self._nbytes > _SMALL else bytes(data))
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""

    def split(self) -> tuple[bytes, bytes]:
        if self._nbytes > _SMALL:
            [gap] = [at for at, piece in enumerate(self._pieces) if not piece]
            return b"".join(self._pieces[:gap]), b"".join(self._pieces[gap + 1 :])
        whole = b"".join(self._pieces)
        at = elements_start(whole, zip_entries(whole)["data/0"])
        return whole[:at], whole[at + self._nbytes :]


def zip_entries(archive: bytes | mmap) -> dict[str, ZipInfo]:
    """The entries of what torch.save wrote, by their names in the archive. Raises BadZipFile."""
    file: Any = BytesIO(archive) if isinstance(archive, bytes) else archive
    return {entry.filename.partition("/")[2]: entry for entry in ZipFile(file).infolist()}


def elements_start(archive: bytes | mmap, entry: ZipInfo) -> int:
    """Where an entry's bytes start: behind its local header, whose name and padding have their own lengths."""
    header = archive[entry.header_offset : entry.header_offset + 30]
    return entry.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


def write_checkpoint_metadata(
    directory: Path, entries: Iterable[Written], global_shapes: Mapping[str, Sequence[int]]
) -> None:
    """The files that make chunks a checkpoint; `metadata.json`, by which it is known, is the last."""
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
    from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    described: dict[str, BytesStorageMetadata | TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for entry in sorted(entries, key=lambda one: (one.key, one.offsets or ())):
        places[MetadataIndex(entry.key, entry.offsets)] = _StorageInfo(entry.file, entry.start, entry.length)
        if entry.offsets is None or entry.sizes is None:
            described[entry.key] = BytesStorageMetadata()
            continue
        size = torch.Size(global_shapes[entry.key])
        properties = TensorProperties(dtype=getattr(torch, entry.dtype))
        known = described.setdefault(entry.key, TensorStorageMetadata(properties, size, []))
        assert isinstance(known, TensorStorageMetadata)
        known.chunks.append(ChunkStorageMetadata(torch.Size(entry.offsets), torch.Size(entry.sizes)))
    metadata = Metadata(described, storage_data=places, storage_meta=StorageMeta(), version=CURRENT_DCP_VERSION)
    (directory / METADATA).write_bytes(pickle.dumps(metadata))
    torch.save({}, directory / "common.pt")
    save_config(CheckpointingConfig("torch_dist"), str(directory))
