"""Sidecars: the YAML beside every table and checkpoint that says what it was made with.

A data set's stands at `{parquet}.nla_meta.yaml`, a model's at `{directory}/nla_meta.yaml`. The layout (`layout.py`)
is shared with other NLA trainers, whose readers pass over what we add at the top level: `injection`, `bos_policy`,
`av_prompt`, `pool`, `baseline` and `reconstructor`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nla_megatron.contract import layout
from nla_megatron.contract.blocks import (
    ApiSummaries,
    AvPromptSpec,
    BaselineSpec,
    CorpusSlice,
    DatasetExtraction,
    InjectionSpec,
    ModelExtraction,
    PoolSpec,
    ProjectionSpec,
    PromptTemplates,
    ReconstructorSpec,
    Tokens,
    read_block,
)
from nla_megatron.contract.files import git_commit
from nla_megatron.contract.prompts import PromptContract
from nla_megatron.errors import SidecarError, WidthError
from nla_megatron.types import DATASET_SIDECAR

if TYPE_CHECKING:
    from nla_megatron.contract.tokenizer import AnyTokenizer

__all__ = [
    "ApiSummaries", "AvPromptSpec", "BaselineSpec", "CorpusSlice", "DatasetExtraction", "DatasetSidecar",
    "InjectionSpec",
    "ModelExtraction", "ModelSidecar", "PoolSpec", "ProjectionSpec", "PromptTemplates", "ReconstructorSpec", "Tokens",
    "check_dataset", "dataset_sidecar_path", "model_sidecar_path", "prompt_contract", "read_dataset_sidecar",
    "read_model_sidecar", "write_dataset_sidecar", "write_model_sidecar",
]  # fmt: skip


@dataclass(frozen=True)
class DatasetSidecar:
    """What a table was made with.

    Attributes:
        stage: `base` (also for tables with explanations), `av_sft`, `ar_sft` or `rl`.
        row_count: rows of the table.
        extraction: model, layer, width and corpus of the activations.
        dataset_id: empty: derived from the other fields when written.
        tokens, prompt_templates, bos_policy: the `PromptContract`; all set in the training stages.
        av_prompt: how the AV's message becomes its prompt, and that; None in files of other trainers.
        injection: how the AV that this data is meant for receives the vector.
        pool: what rows keep of several positions; None where each is of one.
        baseline: what FVE compares with; None in tables of other trainers, and in those built before there was one.
        created_at, git_commit: empty: filled in when written.
    """

    stage: str
    row_count: int
    extraction: DatasetExtraction
    dataset_id: str = ""
    tokens: Tokens | None = None
    prompt_templates: PromptTemplates | None = None
    bos_policy: str | None = None
    av_prompt: AvPromptSpec | None = None
    injection: InjectionSpec | None = None
    pool: PoolSpec | None = None
    baseline: BaselineSpec | None = None
    api_summaries: ApiSummaries | None = None
    parent_datasets: tuple[str, ...] = ()
    keep_debug_metadata: bool = True
    created_at: str = ""
    created_by: str = "nla_megatron"
    git_commit: str = ""

    @classmethod
    def from_contract(
        cls, contract: PromptContract, *, stage: str, row_count: int, extraction: DatasetExtraction, **rest: Any
    ) -> DatasetSidecar:
        """A sidecar that records `contract`; `rest` are the other fields."""
        return cls(stage=stage, row_count=row_count, extraction=extraction, **_recorded(contract), **rest)


@dataclass(frozen=True)
class ModelSidecar:
    """What a checkpoint was trained with.

    Attributes:
        role: `av` or `ar`.
        stage: `init`, `sl` or `rl`.
        base_checkpoint: the base language model.
        d_model: its hidden size.
        extraction: block index K of the activations, and the scales.
        tokens, prompt_templates, bos_policy: the `PromptContract`. `bos_policy` is None only in foreign files.
        av_prompt: how the AV's message becomes its prompt, and that; None in files of other trainers.
        injection: how the AV receives the vector; None for an AR, and in files of other trainers.
        pool: of the rows that it was trained on; None where each is of one position.
        reconstructor: how an AR reads; None for an AV, and for the AR that other trainers have too.
        training: whatever is worth recording; plain YAML values.
    """

    role: str
    stage: str
    base_checkpoint: str
    d_model: int
    extraction: ModelExtraction
    tokens: Tokens
    prompt_templates: PromptTemplates
    bos_policy: str | None = None
    av_prompt: AvPromptSpec | None = None
    injection: InjectionSpec | None = None
    pool: PoolSpec | None = None
    reconstructor: ReconstructorSpec | None = None
    trained_on: tuple[str, ...] = ()
    parent_checkpoints: tuple[str, ...] = ()
    created_at: str = ""
    created_by: str = "nla_megatron"
    git_commit: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_contract(
        cls,
        contract: PromptContract,
        *,
        role: str,
        stage: str,
        base_checkpoint: str,
        d_model: int,
        layer_index: int,
        injection: InjectionSpec | None = None,
        mse_scale: float | str | None = "sqrt_d_model",
        **rest: Any,
    ) -> ModelSidecar:
        """A sidecar that records `contract`; `rest` are the other fields.

        `extraction.injection_scale` is set for `replace` only, the one method other trainers mean by it; with any other
        method they then find no scale and refuse the checkpoint instead of injecting wrongly.
        """
        scale = injection.scale if injection is not None and injection.method == "replace" else None
        return cls(
            role=role,
            stage=stage,
            base_checkpoint=base_checkpoint,
            d_model=d_model,
            extraction=ModelExtraction(layer_index, scale, mse_scale),
            injection=injection,
            **_recorded(contract),
            **rest,
        )


Sidecar = TypeVar("Sidecar", DatasetSidecar, ModelSidecar)


def dataset_sidecar_path(parquet: Path | str) -> Path:
    """Where the sidecar of a table stands."""
    return Path(f"{parquet}{DATASET_SIDECAR}")


def model_sidecar_path(directory: Path | str) -> Path:
    """Where the sidecar of a checkpoint stands."""
    return Path(directory) / "nla_meta.yaml"


def read_dataset_sidecar(parquet_path: Path | str) -> DatasetSidecar:
    """Read the sidecar of a table, ours or another trainer's.

    Raises:
        MissingFile: there is none.
        SidecarError: malformed, of another kind or version, or a key that is missing, unknown or of another type.
    """
    path = dataset_sidecar_path(parquet_path)
    sidecar = read_block(DatasetSidecar, layout.dataset_fields(layout.load(path, "nla_dataset"), path), "", str(path))
    layout.check_dataset_values(sidecar, path)
    return sidecar


def read_model_sidecar(directory: Path | str) -> ModelSidecar:
    """Read the sidecar of a checkpoint directory, ours or another trainer's (roles `actor`, `critic`).

    One trainer leaves the sidecar of the training data there; `foreign.completed` adds what others leave unsaid.

    Raises:
        MissingFile: there is none.
        SidecarError: malformed, of another kind or version, or a key that is missing, unknown or of another type.
    """
    path = model_sidecar_path(directory)
    raw = layout.load(path, "nla_model", "nla_dataset")
    if raw["kind"] == "nla_dataset":
        from nla_megatron.contract.foreign import model_of_dataset

        dataset = read_block(DatasetSidecar, layout.dataset_fields(raw, path), "", str(path))
        return model_of_dataset(dataset, Path(directory))
    sidecar = read_block(ModelSidecar, layout.model_fields(raw, path), "", str(path))
    layout.check_model_values(sidecar, path)
    return sidecar


def write_dataset_sidecar(parquet_path: Path | str, sidecar: DatasetSidecar) -> DatasetSidecar:
    """Write the sidecar of a table atomically, and return it as written, with id, time and commit filled in.

    Raises:
        SidecarError: an unknown stage, norm or policy, or a training stage without its prompt contract.
    """
    path = dataset_sidecar_path(parquet_path)
    layout.check_dataset_values(sidecar, path, ours=True)
    identified = sidecar if sidecar.dataset_id else replace(sidecar, dataset_id=layout.dataset_id(sidecar))
    stamped = _stamped(identified)
    layout.save(path, layout.dataset_yaml(stamped))
    return stamped


def write_model_sidecar(directory: Path | str, sidecar: ModelSidecar) -> ModelSidecar:
    """Write the sidecar of a checkpoint atomically, and return it as written, with time and commit filled in.

    Scales are written as numbers (`"sqrt_d_model"` becomes its value), which every reader understands.

    Raises:
        SidecarError: an unknown role, stage or policy, or an AV without `injection`.
    """
    path = model_sidecar_path(directory)
    layout.check_model_values(sidecar, path, ours=True)
    scales = replace(
        sidecar.extraction,
        injection_scale=_number(sidecar.extraction.injection_scale, sidecar.d_model),
        mse_scale=_number(sidecar.extraction.mse_scale, sidecar.d_model),
    )
    stamped = _stamped(replace(sidecar, extraction=scales))
    layout.save(path, layout.model_yaml(stamped))
    return stamped


def prompt_contract(sidecar: DatasetSidecar | ModelSidecar) -> PromptContract:
    """The prompt contract a sidecar records.

    Raises:
        SidecarError: it records none (a base table), or only a part (another trainer's file without `bos_policy`).
    """
    tokens, templates = sidecar.tokens, sidecar.prompt_templates
    for key, value in {"tokens": tokens, "prompt_templates": templates, "bos_policy": sidecar.bos_policy}.items():
        if value is None:
            raise _lacking(key)
    assert tokens is not None and templates is not None and sidecar.bos_policy is not None
    if templates.ar is None:
        raise _lacking("prompt_templates.critic")
    return PromptContract(
        templates_av=templates.av,
        templates_ar=templates.ar,
        marker=tokens.injection_char,
        marker_id=tokens.injection_token_id,
        left_id=tokens.injection_left_neighbor_id,
        right_id=tokens.injection_right_neighbor_id,
        ar_suffix_ids=tokens.critic_suffix_ids or (),
        bos_policy=sidecar.bos_policy,
        repeats=PoolSpec.bounds_of(sidecar.pool),
        # A chat template that writes the day is told that of the file, where nothing else is recorded.
        form=sidecar.av_prompt or AvPromptSpec(date=sidecar.created_at[:10] or None),
    )


def check_dataset(sidecar: DatasetSidecar, *, d_model: int, layer_index: int, tokenizer: AnyTokenizer) -> None:
    """Compare a data set with the model it is about to be used with.

    Raises:
        WidthError: vectors of another width than `d_model`.
        SidecarError: activations of another block than `layer_index`, or ids that this tokenizer does not give.
        MarkerError: the marker is not one token of this tokenizer.
    """
    found = sidecar.extraction
    remedy = f"use the model the data was made with ({found.base_model!r}), or extract activations again"
    if found.d_model != d_model:
        raise WidthError(f"data set {sidecar.dataset_id!r} with vectors of width {found.d_model}", f"{d_model}", remedy)
    if found.layer_index != layer_index:
        raise SidecarError(
            f"data set {sidecar.dataset_id!r} with activations of block {found.layer_index}",
            f"block {layer_index}, as configured",
            f"set the layer to {found.layer_index}, or extract activations again",
        )
    if sidecar.stage in layout.TRAINING_STAGES:
        prompt_contract(sidecar).check(tokenizer)


def _recorded(contract: PromptContract) -> dict[str, Any]:
    suffix_ids = contract.ar_suffix_ids
    return {
        "tokens": Tokens(contract.marker, contract.marker_id, contract.left_id, contract.right_id, suffix_ids),
        "prompt_templates": PromptTemplates(contract.templates_av, contract.templates_ar),
        "bos_policy": contract.bos_policy,
        "av_prompt": contract.form if contract.form != AvPromptSpec(date=contract.form.date) else None,
    }


def _lacking(key: str) -> SidecarError:
    return SidecarError(
        f"the sidecar has no {key!r}",
        "a table of a training stage, or a checkpoint, that records its prompts",
        f"give another file, or add {key!r} to this sidecar",
    )


def _number(scale: float | str | None, d_model: int) -> float | str | None:
    return math.sqrt(d_model) if scale == "sqrt_d_model" else scale


def _stamped(sidecar: Sidecar) -> Sidecar:
    created_at = sidecar.created_at or datetime.now(UTC).isoformat(timespec="seconds")
    return replace(sidecar, created_at=created_at, git_commit=sidecar.git_commit or git_commit())
