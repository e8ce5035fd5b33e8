"""A Hugging Face model and a LoRA adapter to a merged Hugging Face model: out of place, tensor by tensor, in fp32."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nla_megatron.config.schema import MergeConfig
from nla_megatron.conversion.hf import SHARD_BYTES, SafetensorsReader, copy_companions, read_config, write_shards
from nla_megatron.conversion.peft_format import WEIGHTS, AdapterReader, PeftConfig, read_peft_config
from nla_megatron.conversion.safetensors_file import TensorSpec
from nla_megatron.errors import CheckpointError, RunDirectoryError, UnsupportedModel
from nla_megatron.models.builder import DTYPES

TOKENIZER = ("tokenizer*", "special_tokens_map.json", "chat_template.jinja", "vocab.json", "merges.txt")
_BESIDE = ("value_head.safetensors", "nla_meta.yaml")


def merge(
    base: str | Path, adapter: str | Path, out: str | Path,
    dtype: torch.dtype | None = None, shard_bytes: int = SHARD_BYTES,
) -> None:  # fmt: skip
    """Write `base` with `adapter` added to it as a directory of its own; both sources stay as they are.

    Every weight is W + scale * B A, computed in fp32 and rounded once, to `dtype` or (None) to its own. One tensor at
    a time is in memory.

    Args:
        base: a Hugging Face directory; a sidecar and an AR's head in it go along.
        adapter: a directory that `peft` saved; its tokenizer and sidecar, where it has them, take precedence.
        out: must not exist yet; it appears whole or not at all.

    Raises:
        MissingFile, CheckpointError: the base lacks a weight that is adapted, or has it in another shape.
        UnsupportedModel: the adapter asks for what is not honoured, or the base is quantised.
        RunDirectoryError: `out` is there already.
    """
    config = read_peft_config(adapter)
    merging = Merging(Path(base), AdapterReader(Path(adapter) / WEIGHTS), config)
    with new_directory(out) as partial:
        merging.write(partial, merging.config, dtype, shard_bytes)
        carry(Path(base), partial, _BESIDE)
        carry(Path(adapter), partial, (*TOKENIZER, *_BESIDE))


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
        if quantised := self.config.get("quantization_config"):
            raise UnsupportedModel(
                f"quantization_config={quantised!r} in {base}", "a base in floating point",
                "give the model from which the base was quantised",
            )  # fmt: skip
        self._check()

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
            self.pairs.check(module, self.adapter.rank_of(module), self.reader.shape(f"{module}.weight"))

    def write(self, directory: Path, config: dict[str, Any], dtype: torch.dtype | None, shard_bytes: int) -> None:
        """Weights, config.json and the base's tokenizer files into an empty directory."""
        held = [self.reader.spec(name) for name in self.names]
        specs = [TensorSpec(spec.name, dtype or spec.dtype, spec.shape) for spec in held]
        write_shards(directory, self.tensors(dtype), shard_bytes, specs)
        copy_companions(self.base, directory, config, specs[0].dtype)

    @torch.no_grad()
    def tensors(self, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
        """(name, merged tensor), sorted by name."""
        adapted = {f"{module}.weight": module for module in self.pairs.modules}
        for name in self.names:
            weight = self.reader.whole(name)
            target = dtype or weight.dtype
            if name in adapted:
                A, B = (self.pairs.whole(adapted[name], matrix).float() for matrix in "AB")
                weight = weight.float() + (B @ A) * self.adapter.scale_of(adapted[name])
            yield name, weight.to(target)


@contextmanager
def new_directory(out: str | Path) -> Iterator[Path]:
    """A directory beside `out` that becomes `out` when the block ends well, and is removed when it does not.

    Raises:
        RunDirectoryError: `out` is there already.
    """
    partial = Path(f"{out}.partial")
    if Path(out).exists():
        raise RunDirectoryError(f"{out} is there already", "a new directory", "give another out=, or remove it")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def carry(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    """Copy the files of `source` that match."""
    for pattern in patterns:
        for path in source.glob(pattern):
            shutil.copyfile(path, target / path.name)
