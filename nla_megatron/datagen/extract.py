"""`extract`: raw activations of a model at sampled positions of a corpus.

Every data-parallel share of ranks takes a contiguous part of the documents and writes its own part of the table; the
parts are joined in order. Which positions are sampled depends on (seed, doc_id) alone, so no layout changes a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nla_megatron.config.run_directory import check_run_directory, claim_run_directory, mark_done
from nla_megatron.config.schema import ExtractConfig
from nla_megatron.contract import columns
from nla_megatron.contract.blocks import CorpusSlice, DatasetExtraction
from nla_megatron.contract.corpus import read_corpus
from nla_megatron.contract.sidecar import DatasetSidecar, PoolSpec, write_dataset_sidecar
from nla_megatron.contract.tables import write_table
from nla_megatron.contract.tokenizer import Encoded, ModelTokenizer, load_tokenizer
from nla_megatron.conversion.description import check_directory
from nla_megatron.conversion.hf import read_shape
from nla_megatron.conversion.live import load_from_hf
from nla_megatron.datagen.sentences import sentences_of
from nla_megatron.errors import ConfigError, LayoutError, NotFinite
from nla_megatron.hub import repository_of
from nla_megatron.models.batching import Batch, microbatches
from nla_megatron.models.builder import check_layout
from nla_megatron.models.pipeline import forward_each
from nla_megatron.models.reconstructor import build_backbone
from nla_megatron.parallel.collectives import barrier
from nla_megatron.parallel.progress import progress
from nla_megatron.parallel.world import World, data_parallel_size
from nla_megatron.types import Microbatch, ModelShape

TABLE = "base.parquet"


@dataclass(frozen=True)
class Passage:
    """Tokens that go through the model together, and the positions sampled from them, ascending.

    `kept`: of each position, how many activations its row keeps, where the configuration's `pool` does not say.
    """

    doc_id: str
    ids: tuple[int, ...]
    positions: tuple[int, ...]
    kept: tuple[int, ...] = ()


def layer_of(config: ExtractConfig, shape: ModelShape) -> int:
    """K: as configured, or two thirds of the depth. Raises ConfigError outside the model."""
    layer = 2 * shape.num_layers // 3 if config.layer is None else config.layer
    if not 0 <= layer < shape.num_layers:
        raise ConfigError(f"layer={layer}", f"a block of the model, 0 to {shape.num_layers - 1}", "correct layer=")
    return layer


def check(config: ExtractConfig, world_size: int) -> None:
    """Everything that can be known before the first forward; raises a named error."""
    data_parallel_size(config.parallel, world_size)
    shape = read_shape(config.model)
    kept = shape.truncated(layer_of(config, shape) + 1)
    check_layout(kept, config.parallel, "forward")
    check_directory(config.model, kept, with_head=False)
    if config.parallel.ep > 1:
        raise LayoutError(
            f"parallel.ep={config.parallel.ep} for extraction", "parallel.ep=1",
            "cut the experts with parallel.etp: each data-parallel rank goes through passages of its own",
        )  # fmt: skip
    if config.max_length > shape.max_positions:
        raise ConfigError(
            f"max_length={config.max_length}",
            f"at most the model's {shape.max_positions} positions",
            "lower max_length",
        )
    load_tokenizer(config.model)
    read_corpus(config.corpus)
    check_run_directory("extract", config)


def run(config: ExtractConfig, world: World) -> None:
    if world.is_main:
        claim_run_directory("extract", config)
    barrier(world)
    full = read_shape(config.model)
    layer = layer_of(config, full)
    shape = full.truncated(layer + 1)
    model = build_backbone(shape, world, config.dtype)
    load_from_hf(model, config.model, shape, world, with_head=False)
    documents = _documents(config)
    bounds = [len(documents) * share // world.dp for share in range(world.dp + 1)]
    passages = list(_passages(config, documents[bounds[world.dp_rank] : bounds[world.dp_rank + 1]]))

    batches = _activations(config, world, model, passages, layer)
    if world.speaks_for_its_rows:
        write_table(_part(config, world.dp_rank), batches, _schema(config, shape))
    else:
        for _ in batches:
            pass
    barrier(world)
    if world.is_main:
        _join(config, world, shape, layer, len(documents))


def _documents(config: ExtractConfig) -> list[tuple[str, str]]:
    documents = read_corpus(config.corpus)[config.documents_start :]
    return documents[: config.documents_length]


def _passages(config: ExtractConfig, documents: Sequence[tuple[str, str]]) -> Iterator[Passage]:
    tokenizer = load_tokenizer(config.model)
    special = tokenizer.special_ids
    if not documents:
        return
    by_sentence = config.pool_within == "sentence"
    texts = [text for _, text in documents]
    if by_sentence:
        encoded = tokenizer.encode_located(texts, special=True)
    else:
        encoded = [Encoded(ids, []) for ids in tokenizer.encode_each(texts, special=True)]
    for number, (doc_id, text) in enumerate(documents):
        ids = encoded[number].ids
        sentences = sentences_of(text, encoded[number].offsets) if by_sentence else [0] * len(ids)
        starts = range(0, len(ids), config.max_length) if config.long_documents == "window" else [0]
        for start in starts:
            window = ids[start : start + config.max_length]
            kept = kept_at(config, sentences[start : start + config.max_length])
            positions = sample_positions(config, doc_id, start, window, special, kept)
            if positions:
                yield Passage(doc_id, tuple(window), positions, tuple(kept[at] for at in positions) if kept else ())


def kept_at(config: ExtractConfig, sentences: Sequence[int]) -> list[int]:
    """How many activations a row at each position of a passage would keep; none where all keep as many.

    Args:
        sentences: of each position; a row keeps none of another than its own.
    """
    if config.pool_least is None:
        return []
    kept: list[int] = []
    for at, sentence in enumerate(sentences):
        kept.append(1 + kept[-1] if at and sentence == sentences[at - 1] else 1)
    return [min(count, config.pool_window) for count in kept]


def sample_positions(
    config: ExtractConfig, doc_id: str, start: int, ids: Sequence[int], special: Set[int], kept: Sequence[int] = ()
) -> tuple[int, ...]:
    """Ascending positions of one passage: those that qualify, drawn by a generator keyed by (seed, doc_id, start).

    Args:
        kept: of `kept_at`; positions with fewer than `pool_least` do not qualify.
    """
    candidates = [at for at in range(config.min_position, len(ids)) if ids[at] not in special]
    if config.pool_least is not None:
        candidates = [at for at in candidates if kept[at] >= config.pool_least]
    if not candidates:
        return ()
    key = hashlib.sha256(f"{config.seed}\0{doc_id}\0{start}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(key[:8], "big"))
    chosen = rng.choice(len(candidates), min(config.positions_per_doc, len(candidates)), replace=False)
    return tuple(sorted(candidates[index] for index in chosen))


def kept_of(stream_TD: Tensor, passage: Passage, config: ExtractConfig) -> list[np.ndarray]:
    """What the row of each of a passage's positions keeps, (K, D) fp32 each, its own activation last."""
    if config.pool_least is None:
        return list(pooled_at(stream_TD, passage.positions, config.pool, config.pool_window).cpu().numpy())
    rows = zip(passage.positions, passage.kept, strict=True)
    return [stream_TD[at + 1 - count : at + 1].float().cpu().numpy() for at, count in rows]


def pooled_at(stream_TD: Tensor, positions: Sequence[int], pool: str, window: int) -> Tensor:
    """What rows keep of the `window` positions that end with each of `positions`, fp32.

    Returns:
        (len(positions), K, D): for `stack` all of them, the first one first; otherwise their mean alone.
    """
    last_N = torch.tensor(positions, device=stream_TD.device)
    back_W = torch.arange(window, device=stream_TD.device)
    window_NWD = stream_TD[last_N[:, None] - back_W].float()
    return window_NWD.flip(1) if pool == "stack" else window_NWD.mean(dim=1, keepdim=True)


def _activations(
    config: ExtractConfig, world: World, model: Any, passages: list[Passage], layer: int
) -> Iterator[dict[str, Any]]:
    """Column values, a few passages at a time; empty ones on ranks that do not hold the last block."""
    tokenizer = load_tokenizer(config.model)
    alone = replace(world, dp=1, dp_rank=0)
    bar = progress("extract", active=world.is_main, total=len(passages), bar=config.logger.progress, unit="passage")
    with bar:
        for start in range(0, len(passages), config.batch_size):
            chunk = passages[start : start + config.batch_size]
            found: dict[int, list[np.ndarray]] = {}

            def keep(
                hidden_TBD: Tensor,
                part: Microbatch,
                chunk: list[Passage] = chunk,
                found: dict[int, list[np.ndarray]] = found,
            ) -> None:
                for column, (row, weight) in enumerate(zip(part.rows.tolist(), part.weights.tolist(), strict=True)):
                    if weight:
                        found[row] = kept_of(hidden_TBD[:, column], chunk[row], config)

            batch = Batch(ids=[passage.ids for passage in chunk])
            forward_each(model, microbatches(batch, alone, len(chunk)), world, keep)
            bar.advance(len(chunk))
            if world.speaks_for_its_rows:
                yield _columns(chunk, [kept for row in range(len(chunk)) for kept in found[row]], layer, tokenizer)


def _columns(chunk: list[Passage], kept: list[np.ndarray], layer: int, tokenizer: ModelTokenizer) -> dict[str, Any]:
    """Of each position of the passages; `kept` (K, D) of each, for any K."""
    rows = [(passage, position) for passage in chunk for position in passage.positions]
    for (passage, position), vectors_KD in zip(rows, kept, strict=True):
        if not np.isfinite(vectors_KD).all():
            raise NotFinite(
                f"NaN or infinity in block {layer}'s activation at token {position} of document {passage.doc_id!r}",
                "finite numbers", "compute in another dtype=, or look at the model's weights",
            )  # fmt: skip
    before = [vectors_KD[:-1].reshape(-1) for vectors_KD in kept]
    return {
        columns.N_RAW_TOKENS: [position + 1 for _, position in rows],
        columns.TEXT: [tokenizer.decode(passage.ids[: position + 1], skip_special=True) for passage, position in rows],
        columns.VECTOR: np.stack([vectors_KD[-1] for vectors_KD in kept]),
        columns.PRECEDING: before if chunk[0].kept else np.stack(before),
        columns.LAYER: [layer] * len(rows),
        columns.DOC_ID: [passage.doc_id for passage, _ in rows],
    }


def _pool(config: ExtractConfig) -> PoolSpec | None:
    if config.pool == "last":
        return None
    within = None if config.pool_within == "passage" else config.pool_within
    return PoolSpec(config.pool, config.pool_window, config.pool_least, within)


def _schema(config: ExtractConfig, shape: ModelShape) -> Any:
    positions = None if config.pool_least is not None else PoolSpec.positions_of(_pool(config))
    return columns.schema("base", shape.hidden_size, positions)


def _part(config: ExtractConfig, share: int) -> Path:
    return Path(config.out) / f"part-{share:05d}.parquet"


def _join(config: ExtractConfig, world: World, shape: ModelShape, layer: int, documents: int) -> None:
    import pyarrow.parquet as pq

    parts = [_part(config, share) for share in range(world.dp)]
    batches = (batch for part in parts for batch in pq.ParquetFile(part).iter_batches())
    table = Path(config.out) / TABLE
    rows = write_table(table, batches, _schema(config, shape))
    if not rows:
        raise ConfigError(
            f"no position of {config.corpus} qualifies",
            f"documents longer than min_position={config.min_position} tokens",
            "lower min_position" + (", or pool_least" if config.pool_least else ""),
        )
    extraction = DatasetExtraction(
        base_model=repository_of(config.model), d_model=shape.hidden_size, layer_index=layer,
        corpus=repository_of(config.corpus),
        corpus_slice=CorpusSlice(config.documents_start, documents), positions_per_doc=config.positions_per_doc,
    )  # fmt: skip
    sidecar = DatasetSidecar(stage="base", row_count=rows, extraction=extraction, pool=_pool(config))
    write_dataset_sidecar(table, sidecar)
    for part in parts:
        part.unlink()
    mark_done(config)
