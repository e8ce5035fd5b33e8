"""`build`: document-level splits of an explained table into the tables of the training stages, with their sidecars."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nla_megatron import geometry
from nla_megatron.config.run_directory import check_run_directory, claim_run_directory, mark_done
from nla_megatron.config.schema import BuildConfig, InterventionConfig
from nla_megatron.contract import columns
from nla_megatron.contract.baseline import write_baseline
from nla_megatron.contract.files import write_json
from nla_megatron.contract.markers import several_markers
from nla_megatron.contract.prompts import (
    AR_TEMPLATE,
    AV_PLAIN_TEMPLATE,
    AV_TEMPLATE,
    PromptContract,
    bare_explanation,
    wrap_explanation,
)
from nla_megatron.contract.sidecar import (
    AvPromptSpec,
    DatasetSidecar,
    InjectionSpec,
    PoolSpec,
    ProjectionSpec,
    read_dataset_sidecar,
    write_dataset_sidecar,
)
from nla_megatron.contract.splits import assign_split, held_out
from nla_megatron.contract.tables import Table, write_table
from nla_megatron.contract.tokenizer import load_tokenizer
from nla_megatron.conversion.hf import check_vocabulary, read_shape
from nla_megatron.errors import ColumnError, ConfigError, MissingFile, WidthError
from nla_megatron.reading import shown, text_value
from nla_megatron.tasks.nla_checks import MSE_SCALE, check_stack

HELD_OUT = "held_out"
STAGES = {"av_sft": "av_sft", "ar_sft": "ar_sft", "rl": "rl", HELD_OUT: "rl"}
"""Each table and the stage whose columns it has: the held-out rows are evaluated as RL rows are."""
COUNTS = "build.json"
"""Rows of each table, and how many were left out."""
_ROWS_PER_BATCH = 4096


def check(config: BuildConfig, world_size: int) -> None:
    """Everything that can be known before the first row; raises a named error."""
    if not Path(config.input).is_file():
        raise MissingFile(
            f"no {config.input}", "the table that `explain` writes", "run `nla-megatron explain`, or correct input="
        )
    if set(config.fractions) != {"av_sft", "ar_sft", "rl"}:
        raise ConfigError(f"fractions of {', '.join(config.fractions)}", "av_sft, ar_sft and rl", "correct fractions=")
    assign_split("", config.fractions, config.seed)
    held_out("", config.held_out)
    table, sidecar, shape = (
        Table.open(config.input, "explained"),
        read_dataset_sidecar(config.input),
        read_shape(config.model),
    )
    if table.d_model != shape.hidden_size:
        raise WidthError(
            f"vectors of width {table.d_model} in {config.input}",
            f"{shape.hidden_size}, the hidden size of {config.model}",
            "give the model the activations were extracted from",
        )
    for block in config.intervention.blocks:
        if not block < shape.num_layers:
            key = "layer" if config.intervention.layers is None else "layers"
            raise ConfigError(f"intervention.{key}={block}", f"a block below {shape.num_layers}", "lower it")
    _check_positions(config, table, sidecar.pool)
    gold_explanations(config, table)
    for name in (columns.TEXT, columns.DOC_ID):
        table.column(name)
    _contract(config, sidecar.pool)
    if sidecar.extraction.d_model != table.d_model:
        raise WidthError(
            f"vectors of width {table.d_model} in {config.input}",
            f"{sidecar.extraction.d_model}, as its sidecar says",
            "extract the table again",
        )
    check_vocabulary(Path(config.model), shape.vocab_size)
    check_run_directory("build", config)


def _check_positions(config: BuildConfig, table: Table, pool: PoolSpec | None) -> None:
    """Each of a row's activations needs a marker of its own; a single one may enter at any number of them."""
    check_stack(table, pool)
    positions = PoolSpec.positions_of(pool)
    if PoolSpec.bounds_of(pool) is not None:
        if config.templates.positions != 1:
            raise ConfigError(
                f"templates.positions={config.templates.positions} for {config.input}, whose rows keep each a number "
                "of activations of its own", "1: each prompt repeats the marker for its row's",
                "set templates.positions=1",
            )  # fmt: skip
    elif positions > 1 and config.templates.positions != positions:
        raise ConfigError(
            f"templates.positions={config.templates.positions} for {config.input}, whose rows keep {positions} "
            "activations each", "a marker for each", f"set templates.positions={positions}",
        )  # fmt: skip


def run(config: BuildConfig) -> None:
    claim_run_directory("build", config)
    table, source = Table.open(config.input, "explained"), read_dataset_sidecar(config.input)
    contract, training, written = _contract(config, source.pool), _Mean(table.d_model), {}
    gold = gold_explanations(config, table)
    for split, rows in split_rows(config, table.column(columns.DOC_ID), gold).items():
        stage = STAGES[split]
        schema = columns.schema(stage, table.d_model, None if table.varies else table.positions)
        batches = _batches(table, rows, stage, contract, gold)
        batches = batches if split == HELD_OUT else training.of(batches)
        written[split] = write_table(_path(config, split), batches, schema)
    # The mean is known when all rows have been read; every table has it beside itself, so that it can be moved alone.
    for split, count in written.items():
        sidecar = DatasetSidecar.from_contract(
            contract, stage=STAGES[split], row_count=count, extraction=source.extraction,
            api_summaries=source.api_summaries, injection=injection_of(config.intervention), pool=source.pool,
            baseline=write_baseline(_path(config, split), training.mean_D, training.rows, MSE_SCALE),
            parent_datasets=(source.dataset_id,),
        )  # fmt: skip
        write_dataset_sidecar(_path(config, split), sidecar)
    dropped = table.n_rows - len(gold)
    if dropped:
        print(f"{dropped} of {table.n_rows} rows of {config.input} left out: they have no explanation", file=sys.stderr)
    write_json(Path(config.out) / COUNTS, {"rows": written, "dropped_without_explanation": dropped})
    mark_done(config)


class _Mean:
    """The mean over rows that pass by, of their activations at the scale of the error."""

    def __init__(self, d_model: int):
        self.sum_D, self.rows = np.zeros(d_model), 0

    @property
    def mean_D(self) -> np.ndarray:
        return self.sum_D / self.rows

    def of(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        import torch

        for batch in batches:
            vectors_ND = geometry.normalise(torch.from_numpy(batch[columns.VECTOR]), MSE_SCALE)
            self.sum_D += vectors_ND.double().sum(dim=0).numpy()
            self.rows += len(vectors_ND)
            yield batch


def _path(config: BuildConfig, split: str) -> Path:
    return Path(config.out) / f"{split}.parquet"


def gold_explanations(config: BuildConfig, table: Table) -> dict[int, str]:
    """Row -> the explanation that is taught, without tags around it; of the rows that have one.

    Raises:
        ColumnError: a row without one where `missing_explanations` refuses it, with tags inside, or half characters.
    """
    gold: dict[int, str] = {}
    for row, value in enumerate(table.column(columns.EXPLANATION, nulls=True)):
        where = f"row {row} of {config.input}"
        text = "" if value is None else bare_explanation(text_value(value, where, columns.EXPLANATION))
        if text is None:
            raise ColumnError(
                f"{columns.EXPLANATION!r} in {where} has explanation tags inside: {shown(value)}",
                "a text without them, or with one pair around the whole", "take the tags out",
            )  # fmt: skip
        if text.strip():
            gold[row] = text
        elif config.missing_explanations == "refuse":
            raise ColumnError(
                f"{columns.EXPLANATION!r} in {where} is {shown(value)}", "an explanation in every row",
                "explain these rows, or leave them out with missing_explanations=drop",
            )  # fmt: skip
    return gold


def injection_of(spec: InterventionConfig) -> InjectionSpec:
    """The intervention as sidecars record it."""
    several = spec.blocks if len(spec.blocks) > 1 else None
    projection = ProjectionSpec(**vars(spec.projection)) if spec.method == "project" else None
    return InjectionSpec(spec.method, spec.blocks[0], spec.scale, several, projection)


def _contract(config: BuildConfig, pool: PoolSpec | None) -> PromptContract:
    templates = config.templates
    own = AV_PLAIN_TEMPLATE if templates.format == "plain" else AV_TEMPLATE
    return PromptContract.derive(
        load_tokenizer(config.model),
        templates.av or several_markers(own, templates.positions),
        templates.ar or AR_TEMPLATE,
        templates.marker,
        positions=templates.positions,
        repeats=PoolSpec.bounds_of(pool),
        form=AvPromptSpec(templates.format, date=templates.date, chat_options=templates.chat_options or None),
    )


def split_rows(config: BuildConfig, doc_ids: list[str], kept: Container[int] | None = None) -> dict[str, list[int]]:
    """Rows of each table, of those `kept`; None keeps all. Raises ConfigError where a split gets no document."""
    rows: dict[str, list[int]] = {split: [] for split in STAGES}
    for row, doc_id in enumerate(doc_ids):
        if kept is not None and row not in kept:
            continue
        split = HELD_OUT if held_out(doc_id, config.held_out) else assign_split(doc_id, config.fractions, config.seed)
        rows[split].append(row)
    for split, chosen in rows.items():
        if not chosen and not (split == HELD_OUT and config.held_out == 0):
            raise ConfigError(
                f"no document of {len(set(doc_ids))} falls into {split}",
                "at least one",
                "extract more documents, or change fractions",
            )
    return rows


def _batches(
    table: Table, rows: list[int], stage: str, contract: PromptContract, gold: Mapping[int, str]
) -> Iterator[dict[str, Any]]:
    names = (columns.N_RAW_TOKENS, columns.TEXT, columns.LAYER, columns.DOC_ID)
    values = {name: table.column(name) for name in names}
    for start in range(0, len(rows), _ROWS_PER_BATCH):
        chunk = rows[start : start + _ROWS_PER_BATCH]
        explanations = [gold[row] for row in chunk]
        batch: dict[str, Any] = {name: [values[name][row] for row in chunk] for name in names}
        batch[columns.EXPLANATION] = explanations
        batch[columns.VECTOR], batch[columns.PRECEDING] = table.vectors(chunk), table.preceding(chunk)
        if stage == "ar_sft":
            batch[columns.PROMPT] = [contract.templates_ar.format(explanation=text) for text in explanations]
        else:
            batch[columns.PROMPT] = [contract.messages(count) for count in table.activations[chunk].tolist()]
        if stage == "av_sft":
            batch[columns.RESPONSE] = [wrap_explanation(text) for text in explanations]
        yield batch
