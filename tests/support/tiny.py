"""Real things in miniature: a tokenizer, a random Qwen3, and tables of every stage with their sidecars. All seeded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np

from nla_megatron.contract import columns
from nla_megatron.contract.markers import several_markers
from nla_megatron.contract.prompts import PromptContract, wrap_explanation
from nla_megatron.contract.sidecar import (
    ApiSummaries,
    CorpusSlice,
    DatasetExtraction,
    DatasetSidecar,
    InjectionSpec,
    ModelSidecar,
    PoolSpec,
    write_dataset_sidecar,
    write_model_sidecar,
)
from nla_megatron.contract.tables import write_table
from nla_megatron.conversion.families.qwen3 import config_from_shape
from nla_megatron.conversion.hf import read_config, read_shape
from nla_megatron.datagen.tokenizer import train_tokenizer
from nla_megatron.types import ModelShape

AV_TEMPLATE, AR_TEMPLATE = "Explain <concept><INJECT></concept>", "<text>{explanation}</text> <summary>"
INJECTION = InjectionSpec("norm_add", 1, 1.0)
LAYER = 2
# vLLM's attention on the CPU refuses heads narrower than 32.
SHAPE = ModelShape(
    family="Qwen3ForCausalLM",
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=600,
    rope_theta=10_000.0,
    norm_eps=1e-6,
    tied_embeddings=True,
    qk_norm=True,
    max_positions=256,
)


def tiny_tokenizer(directory: Path, vocab_size: int = SHAPE.vocab_size) -> Path:
    """A byte-level BPE tokenizer trained on a little of Python's own documentation; returns the directory."""
    train_tokenizer((topics[name] for name in sorted(topics)[:12]), vocab_size, directory)
    return directory


def tiny_config(directory: Path, **shape: Any) -> Path:
    """A Hugging Face directory without weights: the tokenizer and a config.json. `shape` are fields of `ModelShape`."""
    tiny_tokenizer(directory)
    config = config_from_shape(ModelShape(**{**vars(SHAPE), **shape}))
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def tiny_model(directory: Path, **shape: Any) -> Path:
    """The same with random weights, as transformers initialises and writes them."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tiny_config(directory, **shape)
    config = Qwen3Config(**read_config(directory))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen3ForCausalLM(config).save_pretrained(directory)
    return directory


def tiny_mixture(directory: Path) -> Path:
    """The same with four experts in each block, of which each token takes two."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    tiny_tokenizer(directory)
    values = config_from_shape(SHAPE)
    for key in ("architectures", "model_type"):
        values.pop(key)
    config = Qwen3MoeConfig(
        **values, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, norm_topk_prob=True
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen3MoeForCausalLM(config).save_pretrained(directory)
    return directory


def tiny_contract(model: Path, positions: int = 1, fewest: int | None = None) -> PromptContract:
    """The prompts of the tiny tables with the tokenizer of `model`, and so many markers, or `fewest` to so many."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    if fewest is not None:
        return PromptContract.derive(tokenizer, AV_TEMPLATE, AR_TEMPLATE, repeats=(fewest, positions))
    template = several_markers(AV_TEMPLATE, positions)
    return PromptContract.derive(tokenizer, template, AR_TEMPLATE, positions=positions)


def tiny_rows(
    width: int, documents: int = 16, rows_per_document: int = 3, positions: int = 1, fewest: int | None = None
) -> dict[str, Any]:
    """Every column a table can have but the prompts: documents of nested prefixes, explanations, random vectors.

    A row has those of `positions`, or the first row of a document those of `fewest`, the next of one more, and so on.
    """
    numbers = [(document, row) for document in range(documents) for row in range(rows_per_document)]
    rng = np.random.default_rng(0)
    own = rng.standard_normal((len(numbers), width), dtype=np.float32)
    before: Any = rng.standard_normal((len(numbers), (positions - 1) * width), dtype=np.float32)
    if fewest is not None:
        counts = [fewest + row % (positions - fewest + 1) for _, row in numbers]
        before = [each[: (count - 1) * width] for each, count in zip(before, counts, strict=True)]
    return {
        columns.N_RAW_TOKENS: [51 + row for _, row in numbers],
        columns.TEXT: [f"Document {document} tells of" + " many things" * (row + 1) for document, row in numbers],
        columns.LAYER: [LAYER] * len(numbers),
        columns.DOC_ID: [f"tiny:train:{document}" for document, _ in numbers],
        columns.EXPLANATION: [f"last: things\nabout: document {document}, row {row}" for document, row in numbers],
        columns.VECTOR: own,
        columns.PRECEDING: before,
    }


def tiny_table(path: Path, model: Path, stage: str, rows: Mapping[str, Any] | None = None) -> Path:
    """Write one table of `stage` for `model`, with its sidecar; `rows` are by default those of `tiny_rows`."""
    width = read_shape(model).hidden_size
    values = dict(rows or tiny_rows(width))
    before = values[columns.PRECEDING]
    counts = [1 + len(each) // width for each in before]
    varies, positions = isinstance(before, list), max(counts)
    pool = PoolSpec("stack", positions, min(counts) if varies else None) if positions > 1 else None
    contract = tiny_contract(model, positions, None if pool is None else pool.least)
    explanations: Sequence[str] = values[columns.EXPLANATION]
    if stage == "ar_sft":
        values[columns.PROMPT] = [AR_TEMPLATE.format(explanation=text) for text in explanations]
    else:
        values[columns.PROMPT] = [contract.messages(count) for count in counts]
    values[columns.RESPONSE] = [wrap_explanation(text) for text in explanations]
    count = write_table(path, [values], columns.schema(stage, width, None if varies else positions))
    extraction = DatasetExtraction(str(model), width, LAYER, "tiny", CorpusSlice(0, 16), positions_per_doc=3)
    if stage in ("base", "explained"):
        summaries = ApiSummaries("keywords", 6, 0.0, "the last word") if stage == "explained" else None
        sidecar = DatasetSidecar("base", count, extraction, pool=pool, api_summaries=summaries)
    else:
        sidecar = DatasetSidecar.from_contract(
            contract, stage=stage, row_count=count, extraction=extraction, injection=INJECTION, pool=pool
        )
    write_dataset_sidecar(path, sidecar)
    return path


def tiny_tables(directory: Path, model: Path) -> dict[str, Path]:
    """A table of every stage, by stage."""
    return {stage: tiny_table(directory / f"{stage}.parquet", model, stage) for stage in columns.STAGES}


def tiny_model_sidecar(
    directory: Path, model: Path, role: str, injection: InjectionSpec | None = INJECTION, layer: int = LAYER
) -> Path:
    """Make `directory` an AV's or AR's as far as its sidecar says."""
    directory.mkdir(parents=True, exist_ok=True)
    sidecar = ModelSidecar.from_contract(
        tiny_contract(model),
        role=role,
        stage="sl",
        base_checkpoint=str(model),
        d_model=read_shape(model).hidden_size,
        layer_index=layer,
        injection=injection if role == "av" else None,
    )
    write_model_sidecar(directory, sidecar)
    return directory
