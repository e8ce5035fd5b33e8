"""Which files and tensors of a Hugging Face directory are its weights, whether they are whole, and finite.

The rule is that of transformers: `model.safetensors` where it is there, else what the index names. An index beside
`model.safetensors` is of an older version of the model, and is passed over. Without either, every file counts that
others do not write beside weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nla_megatron.conversion.formats.json_file import read_json
from nla_megatron.conversion.formats.notes import say_once
from nla_megatron.conversion.safetensors_file import Placed, TensorSpec, mapped, read_header
from nla_megatron.errors import CheckpointError, MissingFile

CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
VALUE_HEAD = "value_head.safetensors"
HEAD_FILE = "reconstructor_head.safetensors"
"""The head of an AR that other trainers would not read as it is meant; `conversion.heads`."""
# Written by others beside the weights.
_NOT_OURS = (VALUE_HEAD, HEAD_FILE, "adapter_model.safetensors", "consolidated")
_SHARD = re.compile(r"(.*)-(\d{5,})-of-(\d{5,})\.safetensors")
COMPUTED = re.compile(
    r"(.*[._])?(original_)?inv_freq|.*\.rotary_emb\.(cos|sin)_cached|.*\.masked_bias|.*\.(attn|self_attn|attention)\.bias"
    r"|(.*\.)?(position_ids|causal_mask)"
)
"""Names of buffers that a model computes from its configuration, which some tools save: they are no weights."""
_OF_QUANTIZATION = re.compile(r".*(scales?|scale_inv|zeros?|zero_point|absmax|quant_map|SCB|g_idx)")
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PIECE = 1 << 24


def weight_files(directory: str | Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files that hold the weights, and which tensor is in which of them where an index says so.

    Raises:
        MissingFile: there are none, or not all of them.
        CheckpointError: an index that cannot be read.
    """
    directory = Path(directory)
    single, index = directory / SINGLE, directory / INDEX
    if single.is_file():
        if index.is_file():
            say_once(f"{single} is read, as transformers reads it; the index beside it is of another version")
        return [single], None
    if index.is_file():
        file_of = _weight_map(index)
        names = sorted(set(file_of.values()))
        if missing := [name for name in names if not (directory / name).is_file()]:
            raise MissingFile(
                f"no {directory / missing[0]}" + (f", nor {len(missing) - 1} others" if missing[1:] else ""),
                f"the shards that {INDEX} names", _remedy(directory, "download what is missing"),
            )  # fmt: skip
        return [directory / name for name in names], file_of
    return _unnamed(directory), None


def _unnamed(directory: Path) -> list[Path]:
    """Files that no index names: all, of which each has to be there."""
    found = sorted(path for path in directory.glob("*.safetensors") if not path.name.startswith(_NOT_OURS))
    if dangling := [path for path in found if not path.is_file()]:
        raise MissingFile(f"{dangling[0]}, a link to a file that is not there", "the weights", "download them again")
    if not found:
        raise MissingFile(
            f"no *.safetensors in {directory}", "a Hugging Face checkpoint",
            _remedy(directory, "export it as safetensors"),
        )  # fmt: skip
    for match in filter(None, (_SHARD.fullmatch(path.name) for path in found)):
        names = {f"{match[1]}-{number:0{len(match[2])}d}-of-{match[3]}.safetensors"
                 for number in range(1, int(match[3]) + 1)}  # fmt: skip
        if missing := sorted(names - {path.name for path in found}):
            raise MissingFile(f"no {directory / missing[0]}", f"all {match[3].lstrip('0')} shards of {match[1]}",
                              _remedy(directory, "download what is missing"))  # fmt: skip
    return found


def _remedy(directory: Path, otherwise: str) -> str:
    """What to do about missing weights: a download that was broken off leaves its traces."""
    places = (directory, directory / ".cache" / "huggingface" / "download")
    partial = [path for place in places if place.is_dir() for path in sorted(place.glob("*.incomplete"))]
    return otherwise if not partial else f"finish the download, of which {partial[0].name} is a part"


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
        raise CheckpointError(f"{index} without a weight_map", "tensors and their files", "download the index again")
    return {name: file for name, file in found.items() if not COMPUTED.fullmatch(name)}


def holds_floats_alone(directory: Path) -> bool:
    """Whether a directory has weights, all in floating point and none of what quantised ones need beside them."""
    try:
        headers = [read_header(path) for path in weight_files(directory)[0]]
    except (MissingFile, CheckpointError):  # said by whoever reads the weights
        return False
    placed = [(name, one.spec.dtype) for header in headers for name, one in header.items()]
    return all(dtype in FLOATS and not _OF_QUANTIZATION.fullmatch(name) for name, dtype in placed)


class SafetensorsReader:
    """The tensors of a Hugging Face directory, from `files`; only the asked bytes are read.

    Raises:
        MissingFile: there is no checkpoint, or a shard that the index names is not there.
        CheckpointError: a file is damaged, or index and shards disagree. Only headers are read to know it.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self._files: dict[str, Path] = {}
        self._placed: dict[str, Placed] = {}
        computed: list[str] = []
        self.files, file_of = weight_files(self.directory)
        for path in self.files:
            computed += self._add(path)
        if file_of is not None:
            self._check_index(file_of)
        self.renamed = {OUTPUT: EMBEDDING} if self._keeps_the_outputs_name() else {}
        """Names in the files of tensors that go by another one here."""
        for stored, name in self.renamed.items():
            self._placed[name], self._files[name] = self._placed.pop(stored), self._files.pop(stored)
        if computed:
            say_once(f"{self.directory} has {len(computed)} tensors that a model computes itself, first {computed[0]}: "
                     "they are passed over")  # fmt: skip

    def _keeps_the_outputs_name(self) -> bool:
        """Whether one tensor is embedding and output layer, and is here under the output layer's name alone.

        So safetensors itself saves a tied pair, and transformers reads it.
        """
        if OUTPUT not in self._placed or EMBEDDING in self._placed or not (self.directory / CONFIG).is_file():
            return False
        from nla_megatron.conversion.families import is_tied

        return is_tied(read_json(self.directory / CONFIG)) or False

    def _check_index(self, file_of: dict[str, str]) -> None:
        for name, file in file_of.items():
            if name not in self._placed or self._files[name] != self.directory / file:
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

    def _add(self, path: Path) -> list[str]:
        """Take the tensors of a file; returns the names of those that are computed and not taken."""
        header = read_header(path)
        for name, placed in header.items():
            if name in self._placed:
                raise CheckpointError(
                    f"{name} in {self._files[name]} and in {path}", "each tensor once", "keep one of the two files"
                )
            if not COMPUTED.fullmatch(name):
                self._placed[name], self._files[name] = placed, path
        return [name for name in header if COMPUTED.fullmatch(name)]

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
        """`tensor[start:stop]` along `axis` (0 or 1): a map of the file, not a copy. Raises CheckpointError."""
        spec = self.spec(name)
        if axis == 0 and spec.shape:
            row = spec.nbytes // max(spec.shape[0], 1)
            stop = min(stop, spec.shape[0])
            rows = TensorSpec(name, spec.dtype, (max(stop - start, 0), *spec.shape[1:]))
            return self._finite(mapped(self._files[name], self._placed[name].start + start * row, rows), name)
        whole = mapped(self._files[name], self._placed[name].start, spec)
        return self._finite(whole[:, start:stop] if spec.shape else whole, name)

    def whole(self, name: str) -> Tensor:
        """A tensor as a map of its file. Raises CheckpointError where it is not finite."""
        return self._finite(mapped(self._files[name], self._placed[name].start, self.spec(name)), name)

    def _finite(self, tensor: Tensor, name: str) -> Tensor:
        check_finite(tensor, name, self._files[name])
        return tensor


def check_finite(tensor: Tensor, name: str, path: Path | str) -> None:
    """Raises CheckpointError for a weight that is NaN or infinite: nothing that a model then computes is of use."""
    if tensor.is_floating_point() and not all(_is_finite(piece) for piece in _pieces(tensor)):
        raise CheckpointError(
            f"NaN or infinity in {name} of {path}", "finite weights",
            "download or make the model again: a merge or a cast may have overflowed",
        )  # fmt: skip


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """What is looked at together; of a strided view nothing is copied."""
    return iter(tensor.reshape(-1).split(_PIECE)) if tensor.is_contiguous() else iter((tensor,))


def _is_finite(tensor: Tensor) -> bool:
    # A NaN is the least and the largest of whatever holds it.
    return not tensor.numel() or all(bool(one.isfinite()) for one in tensor.aminmax())


def finite_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a small file beside the weights, in memory. Raises CheckpointError."""
    from safetensors.torch import load_file

    read_header(path)  # a damaged file is named here
    tensors: dict[str, Any] = load_file(path)
    for name, tensor in tensors.items():
        check_finite(tensor, name, path)
    return tensors


def check_tied(reader: SafetensorsReader) -> None:
    """Raises CheckpointError where a checkpoint of tied embeddings has another output layer of its own."""
    embedding, head = EMBEDDING, OUTPUT
    if head not in reader.names():
        return
    pieces = (reader.whole(name).reshape(-1).split(_PIECE) for name in (embedding, head))
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
        if found.dtype not in FLOATS:
            raise CheckpointError(
                f"{name} of dtype {found.dtype} in {reader.directory}",
                "float32, bfloat16, float16 or float64: quantised weights are not converted",
                "take the original of the checkpoint",
            )
