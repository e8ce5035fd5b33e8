"""Reading boxes of the tensors of a `torch_dist` checkpoint, whoever cut them: mapped from the file where they are
contiguous in it, put together where they are not. No process group is needed.
"""

from __future__ import annotations

import io
import mmap
import pickle
import re
import zipfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nla_megatron.conversion.checkpoint_plan import NAMINGS, CheckpointPlan, Chunk
from nla_megatron.conversion.description import HEAD, is_checkpoint
from nla_megatron.conversion.torch_dist import METADATA, elements_start, zip_entries
from nla_megatron.errors import CheckpointError, MissingFile, UnsupportedModel
from nla_megatron.models.lora_spec import LORA

_EMBEDDING = "embedding.word_embeddings.weight"
_STORAGES = {
    "FloatStorage": torch.float32, "BFloat16Storage": torch.bfloat16, "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64,
}  # fmt: skip
_UNREADABLE = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError, ImportError, MemoryError,
    OverflowError,
)  # fmt: skip
"""What a damaged pickle raises."""
_DAMAGED = "copy or save the checkpoint again"
# Beside the weights in a training checkpoint: the optimizer, generators, empty states of layers.
_NOT_WEIGHTS = re.compile(r"(chained_\d+\.)?optimizer\.|rng_state|rerun_state")


class TorchDistReader:
    """The tensors of a checkpoint.

    Raises:
        MissingFile: it is no such checkpoint, or lacks a file.
        CheckpointError: a file is shorter than the metadata says, or the metadata is unreadable.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        if not is_checkpoint(self.directory) or not (self.directory / METADATA).is_file():
            raise MissingFile(
                f"no checkpoint of megatron-core's torch_dist format in {directory}",
                "metadata.json, .metadata and *.distcp files", "give the directory that holds them",
            )  # fmt: skip
        self.prefix = ""
        metadata = self._metadata()
        self._tensors = {key: one for key, one in metadata.state_dict_metadata.items() if hasattr(one, "chunks")}
        self._places = metadata.storage_data
        self._by_place: dict[str, Mapping[tuple[int, ...], list[Any]]] = {}
        self._check_files()

    def _metadata(self) -> Any:
        from torch.distributed.checkpoint import FileSystemReader

        try:
            return FileSystemReader(self.directory).read_metadata()
        except _UNREADABLE as error:
            raise CheckpointError(f"{self.directory / METADATA}: {error}", "a whole file", _DAMAGED) from None

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for place in self._places.values():
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        for file, end in ends.items():
            path = self.directory / file
            if not path.is_file():
                raise MissingFile(f"no {path}", f"the file that {METADATA} names", _DAMAGED)
            if path.stat().st_size < end:
                raise CheckpointError(f"{path} of {path.stat().st_size} bytes", f"at least {end}", _DAMAGED)

    @property
    def is_ar(self) -> bool:
        return any(key.endswith(HEAD) and not _NOT_WEIGHTS.match(key) for key in self._tensors)

    def num_layers(self) -> int:
        """Blocks of the model, as their attention's output projection tells."""
        keys = [key for key in self._tensors if not _NOT_WEIGHTS.match(key)]
        stacked = [key for key in keys if key.endswith("decoder.layers.self_attention.linear_proj.weight")]
        if stacked:
            return int(self._tensors[stacked[0]].size[0])
        return sum(key.endswith(".self_attention.linear_proj.weight") and "decoder.layers." in key for key in keys)

    def matching_plan(self, plan_of: Callable[[int], CheckpointPlan], padded: Mapping[str, int]) -> CheckpointPlan:
        """The plan, of those that megatron-core can make, whose keys this checkpoint has, behind one constant prefix.

        Args:
            plan_of: the plan of a naming.
            padded: real rows of the parameters whose rows may be padded otherwise than ours.

        Raises:
            UnsupportedModel: it holds adapters alone.
            CheckpointError: a tensor is missing, left over, or of another shape: it is of another model.
        """
        keys = [key for key in self._tensors if key.endswith(_EMBEDDING) and not _NOT_WEIGHTS.match(key)]
        if not keys and any(f".{LORA}." in key for key in self._tensors):
            raise UnsupportedModel(
                f"adapters alone in {self.directory}", "a checkpoint of a whole model",
                "of rl: nla-megatron export, which builds what the run began with; of sft: what it exported at its end",
            )  # fmt: skip
        if not keys:
            raise CheckpointError(f"no {_EMBEDDING} in {self.directory}", "a language model's checkpoint", _DAMAGED)
        self.prefix = min(keys, key=len).removesuffix(_EMBEDDING)
        plans: list[CheckpointPlan] = []
        missing: list[int] = []
        while 0 not in missing and len(plans) < NAMINGS:
            plans.append(plan_of(len(plans)))
            missing.append(sum(self.prefix + key not in self._tensors for key in plans[-1].keys()))
        plan = plans[missing.index(min(missing))]
        self._check_keys(plan, padded)
        return plan

    def _check_keys(self, plan: CheckpointPlan, padded: Mapping[str, int]) -> None:
        expected = plan.keys()
        rows = {chunk.key: rows for name, rows in padded.items() for chunk in plan.parameters.get(name, ())}
        found = {
            key.removeprefix(self.prefix): tuple(one.size)
            for key, one in self._tensors.items()
            if key.startswith(self.prefix) and not _NOT_WEIGHTS.match(key)
        }
        remedy = "check that config.json is this checkpoint's: it may be of another family or size"
        for problem, keys in (("lacks", expected.keys() - found.keys()), ("also has", found.keys() - expected.keys())):
            if keys:
                raise CheckpointError(
                    f"{self.directory} {problem} {len(keys)} tensors, first {min(keys)!r}",
                    "exactly the tensors of its config.json", remedy,
                )  # fmt: skip
        for key, shape in expected.items():
            there = found[key]
            self._check_chunks(self.prefix + key)
            if there != shape and not (key in rows and there[1:] == shape[1:] and there[0] >= rows[key]):
                raise CheckpointError(f"{key} of shape {there} in {self.directory}", f"shape {shape}", remedy)

    def _check_chunks(self, key: str) -> None:
        """The chunks of one checkpoint do not overlap: they are all there if they have as many elements."""
        one = self._tensors[key]
        filled = sum(prod(chunk.sizes) for chunk in one.chunks)
        if filled != prod(one.size):
            raise CheckpointError(
                f"{filled} of {prod(one.size)} elements of {key} in {self.directory}", "all of them", _DAMAGED
            )

    def dtype(self, chunk: Chunk) -> torch.dtype:
        return self._tensors[self.prefix + chunk.key].properties.dtype

    def run(self, chunks: tuple[Chunk, ...], start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of a parameter, flat; both at the beginning of a row."""
        pieces = []
        for chunk in chunks:
            first, last = max(start, chunk.start), min(stop, chunk.start + chunk.numel)
            if first < last:
                row = prod(chunk.shape[1:])
                pieces.append(self._rows(chunk, (first - chunk.start) // row, (last - chunk.start) // row).reshape(-1))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _rows(self, chunk: Chunk, first: int, last: int) -> Tensor:
        axis = len(chunk.sizes) - chunk.axes
        low, high = list(chunk.offsets), [at + size for at, size in zip(chunk.offsets, chunk.sizes, strict=True)]
        low[axis], high[axis] = chunk.offsets[axis] + first, chunk.offsets[axis] + last
        return self._box(self.prefix + chunk.key, low, high, axis)

    def _box(self, key: str, low: list[int], high: list[int], stacked: int) -> Tensor:
        """The elements from `low` to `high` of a tensor whose first `stacked` axes number blocks and experts."""
        shape = [top - bottom for bottom, top in zip(low, high, strict=True)]
        out, filled = torch.empty(0), 0
        for stored in self._chunks(key, stacked)[tuple(low[:stacked])]:
            ends = [at + size for at, size in zip(stored.offsets, stored.sizes, strict=True)]
            inner = [(max(a, b), min(c, d)) for a, b, c, d in zip(low, stored.offsets, high, ends, strict=True)]
            if any(a >= b for a, b in inner):
                continue
            source = self._stored(key, stored.offsets)
            source = source[tuple(slice(a - at, b - at) for (a, b), at in zip(inner, stored.offsets, strict=True))]
            if list(source.shape) == shape:
                return source
            out = out if filled else torch.empty(shape, dtype=source.dtype)
            filled += source.numel()
            out[tuple(slice(a - at, b - at) for (a, b), at in zip(inner, low, strict=True))].copy_(source)
        assert filled == prod(shape), f"{filled} elements of {key} from {low}: its chunks overlap"
        return out

    def _chunks(self, key: str, stacked: int) -> Mapping[tuple[int, ...], list[Any]]:
        """The stored chunks of a tensor by block and expert: a mixture has tens of thousands of a kind."""
        if key not in self._by_place:
            by_place = self._by_place[key] = defaultdict[tuple[int, ...], list[Any]](list)
            for chunk in self._tensors[key].chunks:
                reach = zip(chunk.offsets[:stacked], chunk.sizes[:stacked], strict=True)
                for place in product(*(range(at, at + size) for at, size in reach)):
                    by_place[place].append(chunk)
        return self._by_place[key]

    def _stored(self, key: str, offsets: torch.Size) -> Tensor:
        """A chunk as a map of its file: an uncompressed archive of a small pickle and the elements."""
        from torch.distributed.checkpoint.metadata import MetadataIndex

        place = self._places[MetadataIndex(key, offsets)]
        page = place.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        with (self.directory / place.relative_path).open("rb") as file:
            window = mmap.mmap(
                file.fileno(), place.offset - page + place.length, access=mmap.ACCESS_COPY, offset=page
            )  # fmt: skip
        try:
            entries = zip_entries(window)
            data, skeleton = entries["data/0"], entries["data.pkl"]
            at = elements_start(window, skeleton)
            layout = _Layout(io.BytesIO(window[at : at + skeleton.file_size])).load()
        except (zipfile.BadZipFile, *_UNREADABLE) as error:
            raise CheckpointError(f"{key} in {self.directory}: {error}", "a plain tensor", _DAMAGED) from None
        raw = torch.frombuffer(window, dtype=torch.uint8, count=data.file_size, offset=elements_start(window, data))
        dtype, offset, size, stride = layout
        return raw.view(dtype).as_strided(size, stride, offset)


class _Layout(pickle.Unpickler):
    """Unpickles a saved tensor to (dtype, storage offset, size, stride) and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda dtype, offset, size, stride, *_: (dtype, offset, size, stride)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *_: data
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"it holds a {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return pid[1]
