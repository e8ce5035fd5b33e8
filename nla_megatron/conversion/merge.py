"""A Hugging Face model and a LoRA adapter to a merged Hugging Face model: out of place, tensor by tensor, in fp32."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nla_megatron.config.lock import Lock
from nla_megatron.config.schema import MergeConfig
from nla_megatron.conversion import families
from nla_megatron.conversion.formats.config_keys import QUANTIZATION
from nla_megatron.conversion.formats.weights import check_finite, weight_files
from nla_megatron.conversion.hf import (
    HEAD_FILE,
    SHARD_BYTES,
    VALUE_HEAD,
    SafetensorsReader,
    check_tied,
    copy_companions,
    read_config,
    write_index,
)
from nla_megatron.conversion.manifest import Record, dtype_name, read_manifest, write_manifest
from nla_megatron.conversion.peft_format import CONFIG, WEIGHTS, AdapterReader, PeftConfig, read_peft_config
from nla_megatron.conversion.projections import carry_projections
from nla_megatron.conversion.safetensors_file import Shard, ShardFile, TensorSpec, cast, plan_shards
from nla_megatron.conversion.work import Work
from nla_megatron.disk import room_on
from nla_megatron.errors import CheckpointError, RunDirectoryError, UnsupportedModel
from nla_megatron.models.builder import DTYPES

TOKENIZER = ("tokenizer*", "special_tokens_map.json", "chat_template.jinja", "vocab.json", "merges.txt")
_BESIDE = (VALUE_HEAD, HEAD_FILE, "nla_meta.yaml")
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def merge(
    base: str | Path, adapter: str | Path, out: str | Path,
    dtype: torch.dtype | None = None, shard_bytes: int = SHARD_BYTES,
) -> None:  # fmt: skip
    """Write `base` with `adapter` added to it as a directory of its own; both sources stay as they are.

    Where the adapter has the output layer of tied embeddings, the result's are not tied: the embedding has no adapter.

    Every weight is W + scale * B A, computed in fp32 and rounded once, to `dtype` or (None) to its own. One tensor at
    a time is in memory.

    Args:
        base: a Hugging Face directory; a sidecar and an AR's head in it go along.
        adapter: a directory that `peft` saved; its tokenizer and sidecar, where it has them, take precedence.
        out: must not exist yet; it appears whole or not at all, and a merge that was killed goes on where it was.

    Raises:
        DiskFull: no room.
        MissingFile, CheckpointError: the base lacks a weight that is adapted, or has it in another shape.
        UnsupportedModel: the adapter asks for what is not honoured, or the base is quantised.
        CheckpointError: weights that are not finite, with the adapter or without it.
        RunDirectoryError: `out` is there already.
    """
    base, adapter, out = Path(base), Path(adapter), Path(out)
    if out.exists() and read_manifest(out) is None:
        raise RunDirectoryError(f"{out} is there already", "a new directory", "give another out=, or remove it")
    config = read_peft_config(adapter)
    merging = Merging(base, AdapterReader(adapter / WEIGHTS), config)
    specs = merging.specs(dtype)
    shards = {shard.file: shard for shard in plan_shards(specs, shard_bytes)}
    work = Work(out, _plan(base, adapter, dtype, shard_bytes))
    if work.check():
        return
    work.check_room(sum(shard.nbytes for shard in shards.values()))
    work.begin()
    with room_on(work.partial):
        for file in work.unfinished(list(shards)):
            work.finish(file, {"records": [vars(one) for one in merging.write_shard(work.partial, shards[file])]})
        work.flush()
        write_index(work.partial, list(shards.values()))
        copy_companions(base, work.partial, merging.config, specs[0].dtype)
        carry(base, work.partial, _BESIDE)
        carry(adapter, work.partial, (*TOKENIZER, *_BESIDE))
        for source in (base, adapter):
            carry_projections(source, work.partial)
        records = (Record(**one) for entry in work.entries(list(shards)) for one in entry["records"])
        write_manifest(work.partial, base, work.plan, records)
        work.publish()


def is_tied(config: Mapping[str, Any], reader: SafetensorsReader) -> bool:
    """Whether a model's output layer is its embedding: as config.json says, or its family where it does not."""
    known = families.is_tied(config)
    return known if known is not None else f"{HEAD}.weight" not in reader.names()


def _plan(base: Path, adapter: Path, dtype: torch.dtype | None, shard_bytes: int) -> dict[str, Any]:
    heads = (base / name for name in (VALUE_HEAD, HEAD_FILE))
    files = [*weight_files(base)[0], *filter(Path.is_file, heads), adapter / CONFIG, adapter / WEIGHTS]
    return {
        "direction": "merge", "source": str(base.resolve()), "adapter": str(adapter.resolve()),
        "dtype": None if dtype is None else dtype_name(dtype), "shard_bytes": shard_bytes,
        "shards": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files],
    }  # fmt: skip


def check(config: MergeConfig, world_size: int) -> None:
    """Everything that can be known before the first tensor; raises a named error."""
    Merging(Path(config.base), AdapterReader(Path(config.adapter) / WEIGHTS), read_peft_config(config.adapter))


def run(config: MergeConfig) -> None:
    merge(config.base, config.adapter, config.out, DTYPES[config.dtype] if config.dtype else None)


class Merging:
    """A base model and the pairs that are added to it, checked against each other.

    Args:
        keep: which of the base's tensors are written, by name.

    Raises:
        CheckpointError, UnsupportedModel: as `merge`.
    """

    def __init__(
        self, base: Path, pairs: AdapterReader, adapter: PeftConfig, keep: Callable[[str], bool] = lambda name: True
    ):
        self.base, self.pairs, self.adapter = base, pairs, adapter
        self.config, self.reader = read_config(base), SafetensorsReader(base)
        self.names = sorted(name for name in self.reader.names() if keep(name))
        self.unties = False
        for key in (key for key, value in self.config.items() if QUANTIZATION.fullmatch(key) and value):
            raise UnsupportedModel(
                f"{key}={self.config[key]!r} in {base}", "a base in floating point",
                "give the model from which the base was quantised",
            )  # fmt: skip
        if is_tied(self.config, self.reader):
            check_tied(self.reader)
            self._untie()
        self._check()

    def _untie(self) -> None:
        """An adapter of the output layer alone leaves the embedding as it is: the result has one of each."""
        if HEAD in self.pairs.modules and f"{EMBEDDING}.weight" in self.names:
            self.config, self.unties = {**self.config, "tie_word_embeddings": False}, True
            self.names = sorted({*self.names, f"{HEAD}.weight"})

    def _source(self, name: str) -> str:
        """The base's tensor that is written under a name."""
        return f"{EMBEDDING}.weight" if self.unties and name == f"{HEAD}.weight" else name

    def _check(self) -> None:
        if not self.pairs.modules:
            raise CheckpointError(
                f"no adapted weight in {self.pairs.path}", "A and B of linear layers", "save it again"
            )
        here = set(self.names)
        for module in self.pairs.modules:
            if f"{module}.weight" not in here:
                raise CheckpointError(
                    f"{self.pairs.path} adapts {module}; {self.base} has no {module}.weight for it",
                    "the base model that the adapter was trained on", "give that model as base=",
                )  # fmt: skip
            shape = self.reader.shape(self._source(f"{module}.weight"))
            self.pairs.check(module, self.adapter.rank_of(module), shape)

    def write(self, directory: Path, config: dict[str, Any], dtype: torch.dtype | None, shard_bytes: int) -> None:
        """Weights, config.json and the base's tokenizer files into an empty directory."""
        specs = self.specs(dtype)
        shards = plan_shards(specs, shard_bytes)
        for shard in shards:
            self.write_shard(directory, shard)
        write_index(directory, shards)
        copy_companions(self.base, directory, config, specs[0].dtype)

    def specs(self, dtype: torch.dtype | None) -> list[TensorSpec]:
        """The merged tensors, sorted by name."""
        held = {name: self.reader.spec(self._source(name)) for name in self.names}
        return [TensorSpec(name, dtype or spec.dtype, spec.shape) for name, spec in held.items()]

    def write_shard(self, directory: Path, shard: Shard) -> list[Record]:
        file = ShardFile(directory, shard)
        try:
            return [Record.of(spec, file.write(spec.name, self._merged(spec)), shard.file) for spec in shard.specs]
        finally:
            file.close()

    @torch.no_grad()
    def _merged(self, spec: TensorSpec) -> Tensor:
        weight, module = self.reader.whole(self._source(spec.name)), spec.name.removesuffix(".weight")
        if module != spec.name and module in self.pairs.modules:
            A, B = (self.pairs.whole(module, matrix).float() for matrix in "AB")
            weight = weight.float() + (B @ A) * self.adapter.scale_of(module)
            check_finite(weight, f"{spec.name} with the adapter", self.pairs.path)
        return cast(weight, spec)


@contextmanager
def new_directory(out: str | Path) -> Iterator[Path]:
    """A directory beside `out` that becomes `out` when the block ends well, and is removed when it does not.

    Raises:
        RunDirectoryError: `out` is there already, or something else, or somebody else, is beside it.
        DiskFull: no room.
    """
    partial = Path(f"{out}.partial")
    if Path(out).exists():
        raise RunDirectoryError(f"{out} is there already", "a new directory", "give another out=, or remove it")
    lock = Lock(partial, ".lock")
    if partial.exists() and not lock.path.is_file():
        raise RunDirectoryError(f"{partial}, which is another command's", "nothing there", "finish that, or remove it")
    with room_on(partial):
        partial.mkdir(parents=True, exist_ok=True)
        lock.take()
        try:
            _empty(partial, but=lock.path)
            yield partial
            lock.path.unlink()
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            lock.release()


def _empty(directory: Path, but: Path) -> None:
    """Remove what a killed command left."""
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path != but:
            path.unlink()


def carry(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    """Copy the files of `source` that match."""
    for pattern in patterns:
        for path in source.glob(pattern):
            shutil.copyfile(path, target / path.name)
