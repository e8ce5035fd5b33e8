"""Checkpoints of other NLA trainers as directories of ours, in each form in which those trainers leave them.

a whole model        config.json, weights, an AR's value_head.safetensors
an AV's adapter      adapter_config.json, adapter_model.safetensors; the base model is elsewhere
an AR's adapter      ar_lora_value_head.safetensors (adapter and head), ar_meta.json; the base model is elsewhere
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nla_megatron.config.schema import AdoptConfig
from nla_megatron.contract.blocks import InjectionSpec, ReconstructorSpec
from nla_megatron.contract.foreign import AR_ADAPTER, AR_META, completed, role_of
from nla_megatron.contract.sidecar import (
    ModelSidecar,
    prompt_contract,
    read_model_sidecar,
    write_model_sidecar,
)
from nla_megatron.contract.tokenizer import keep_as_it_stands, load_tokenizer
from nla_megatron.contract.tokens import live_bos_policy
from nla_megatron.conversion.formats.json_file import read_json
from nla_megatron.conversion.formats.weights import weight_files
from nla_megatron.conversion.heads import check_head
from nla_megatron.conversion.hf import (
    HEAD_FILE,
    INDEX,
    SHARD_BYTES,
    VALUE_HEAD,
    read_config,
    read_shape,
    truncated_config,
    write_value_head,
)
from nla_megatron.conversion.merge import TOKENIZER, Merging, carry, new_directory
from nla_megatron.conversion.peft_format import CONFIG, WEIGHTS, AdapterReader, PeftConfig, read_peft_config
from nla_megatron.conversion.projections import carry_projections
from nla_megatron.errors import MissingFile, SidecarError, UnsupportedModel
from nla_megatron.models.builder import DTYPES

_BLOCK = re.compile(r"\.layers\.(\d+)\.")
_AR_HEAD = "value_head.weight"


@dataclass(frozen=True)
class Told:
    """What the user says of a checkpoint whose sidecar does not; see `contract.foreign.completed`."""

    trainer: str | None = None
    injection: InjectionSpec | None = None
    bos_policy: str | None = None
    layer_index: int | None = None


def check(config: AdoptConfig, world_size: int) -> None:
    """The sidecar is there and complete; raises a named error."""
    directory = config.checkpoint if config.sidecar is None else config.sidecar
    sidecar = read_model_sidecar(directory)
    if config.sidecar is not None:
        sidecar = replace(sidecar, role=role_of(Path(config.checkpoint)))
    completed(sidecar, config.checkpoint, **vars(_told(config)))


def run(config: AdoptConfig) -> None:
    adopt(
        config.checkpoint, config.out, _told(config), base=config.base, sidecar=config.sidecar,
        dtype=DTYPES[config.dtype] if config.dtype else None,
    )  # fmt: skip


def _told(config: AdoptConfig) -> Told:
    return Told(trainer=config.trainer, bos_policy=config.bos_policy, layer_index=config.layer_index)


def adopt(
    source: str | Path, out: str | Path, told: Told, *,
    base: str | Path | None = None, sidecar: str | Path | None = None, dtype: torch.dtype | None = None,
) -> ModelSidecar:  # fmt: skip
    """Write another trainer's checkpoint as a directory that this package trains, evaluates and exports.

    Args:
        source: one of the three forms; it stays as it is.
        out: a new directory; it appears whole or not at all.
        base: the whole model that an adapter was trained on.
        sidecar: a directory with the sidecar, where `source` has none.
        dtype: of merged weights; None keeps the base's.

    Raises:
        MissingFile: no sidecar, no base for an adapter, or incomplete weights.
        SidecarError: what the sidecar leaves unsaid and `told` does not say either; a depth that is not K+1; ids that
            the tokenizer does not give.
        CheckpointError, UnsupportedModel: weights that do not fit, or a model that ours would not compute alike.
        RunDirectoryError: `out` is there already.
    """
    source = Path(source)
    read = read_model_sidecar(source if sidecar is None else sidecar)
    if sidecar is not None:
        read = replace(read, role=role_of(source))
    _check_meta(source)
    full = completed(read, str(source), **vars(told))
    with new_directory(out) as partial:
        if (source / AR_ADAPTER).is_file():
            _merge_ar(source, _given(base, source), partial, dtype)
        elif (source / CONFIG).is_file() and not (source / "config.json").is_file():
            config = read_peft_config(source)
            merging = Merging(_given(base, source), AdapterReader(source / WEIGHTS), config)
            merging.write(partial, merging.config, dtype, SHARD_BYTES)
        else:
            _copy(source, partial)
        carry(source, partial, TOKENIZER)
        carry_projections(source, partial)
        _check_depth(partial, full, source)
        check_head(partial, read_shape(partial), full.reconstructor or ReconstructorSpec(), full.role)
        return write_model_sidecar(partial, _checked(full, partial, resolve=read.bos_policy is None))


def _checked(sidecar: ModelSidecar, directory: Path, resolve: bool) -> ModelSidecar:
    """The sidecar after a check of its ids against the tokenizer beside it.

    Args:
        resolve: write the policy `tokenizer` as `none` where the tokenizer adds nothing, as our own tables do.
    """
    tokenizer = load_tokenizer(directory)
    if resolve and sidecar.bos_policy == "tokenizer":
        sidecar = replace(sidecar, bos_policy=live_bos_policy(tokenizer))
    contract = prompt_contract(sidecar)
    if (literal := contract.literal(tokenizer)) is not None:
        keep_as_it_stands(directory)
        tokenizer = literal
        print(
            "tokenizer: transformers makes it anew and splits what was trained as one token; the copy's "
            "tokenizer_config.json has it read as tokenizer.json stands", file=sys.stderr,
        )  # fmt: skip
    contract.check(tokenizer)
    return replace(sidecar, av_prompt=contract.fixed(tokenizer).form) if sidecar.role == "av" else sidecar


def _given(base: str | Path | None, source: Path) -> Path:
    if base is None:
        raise MissingFile(f"{source} holds an adapter only", "the model it was trained on", "give it as base=")
    return Path(base)


def _check_meta(source: Path) -> None:
    """Raises UnsupportedModel for an AR whose head reads the final norm's output."""
    path = source / AR_META
    if path.is_file() and read_json(path).get("final_norm_stripped") is False:
        raise UnsupportedModel(
            f"final_norm_stripped=false in {path}", "an AR whose head reads the residual stream",
            "train the AR again without the final norm",
        )  # fmt: skip


def _merge_ar(source: Path, base: Path, target: Path, dtype: torch.dtype | None) -> None:
    """The first blocks of a base with an AR's adapter, and its head."""
    meta = read_json(source / AR_META) if (source / AR_META).is_file() else {}
    if missing := [key for key in ("ar_num_layers", "lora_r", "lora_alpha") if key not in meta]:
        raise MissingFile(f"no {missing[0]} in {source / AR_META}", "what the trainer writes there", "copy it again")
    depth = meta["ar_num_layers"]
    pairs = AdapterReader(source / AR_ADAPTER, prefix="backbone.", beside=(_AR_HEAD,))

    def keep(name: str) -> bool:
        block = _BLOCK.search(name)
        return int(block[1]) < depth if block else name == "model.embed_tokens.weight"

    # The trainer always scales by the square root of the rank and does not write that down.
    merging = Merging(base, pairs, PeftConfig(meta["lora_r"], meta["lora_alpha"], rslora=True), keep)
    merging.write(target, truncated_config(merging.config, depth), dtype, SHARD_BYTES)
    write_value_head(target, pairs.beside(_AR_HEAD))


def _copy(source: Path, target: Path) -> None:
    """Weights by hard link where the file system can, all other files of a model by copy."""
    files, file_of = weight_files(source)
    for path in (*files, *filter(Path.is_file, (source / name for name in (VALUE_HEAD, HEAD_FILE)))):
        try:
            os.link(path.resolve(), target / path.name)
        except OSError:  # another file system
            shutil.copyfile(path, target / path.name)
    carry(source, target, ("*.json", "*.model", "*.txt", "*.jinja"))
    if file_of is None:  # an index that is none of these weights'
        (target / INDEX).unlink(missing_ok=True)
    carry_projections(source, target)


def _check_depth(directory: Path, sidecar: ModelSidecar, source: Path) -> None:
    """An AR is the blocks 0 to K: one less caps what it can explain, one more reads another stream."""
    depth, layer = read_config(directory)["num_hidden_layers"], sidecar.extraction.layer_index
    if sidecar.role == "ar" and sidecar.reconstructor is not None and sidecar.reconstructor.layer is not None:
        layer = sidecar.reconstructor.layer
    if sidecar.role == "ar" and layer is not None and depth != layer + 1:
        raise SidecarError(
            f"an AR of {depth} blocks for activations of block {layer}, in {source}",
            f"{layer + 1} blocks", "check the sidecar, or make the AR again from the base model",
        )  # fmt: skip
