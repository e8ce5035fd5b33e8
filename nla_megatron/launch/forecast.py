"""How long the demo is going to take: the multiplications of its stages, by how many this machine does in a second.

Legend: N weights that a token is multiplied with. A token costs 2 N forward and 4 N more where something is learned.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nla_megatron.config.compose import compose
from nla_megatron.types import ModelShape

ROW_TOKENS, TEXT_TOKENS = 52, 44
"""Of an AV's prompt and response, and of the text that an AR reads, on average with the demo's explanations."""
QUOTED_TOKENS = 1.6
"""Of a word that is quoted."""
CORPUS_TOKENS, CORPUS_DOCUMENTS = 600_000, 650
_HALF_WIDTH = 500
"""A hidden size with which training reaches half of the speed of a large matrix product; the wider, the more. At 576 it
was 0.59 of it on one core, forward and backward."""
START_SECONDS = {"pretrain": 12, "extract": 12, "explain": 3, "build": 5, "sft": 15, "eval": 40, "rl": 45}
"""Imports, loading, an engine's start, the export."""
_PRODUCT, _SECONDS = 1024, 0.4


@dataclass(frozen=True)
class Sizes:
    """Of the demo: its model, whose first `blocks` the AR has, and the corpus in tokens."""

    shape: ModelShape
    blocks: int
    corpus: int

    @classmethod
    def of(cls, shape: ModelShape, layer: int | None, documents: int | None) -> Sizes:
        """`layer`: whose output the activations are, None for two thirds of the depth; `documents`: None for all."""
        share = 1.0 if documents is None else min(1.0, documents / CORPUS_DOCUMENTS)
        return cls(shape, 1 + (2 * shape.num_layers // 3 if layer is None else layer), round(share * CORPUS_TOKENS))


def flops(command: str, config: Any, sizes: Sizes) -> float:
    """What a stage multiplies and adds, each counted; nothing of one that only reads and writes."""
    writer, reader = weights(sizes.shape), weights(sizes.shape, sizes.blocks)
    row, text = 2.0 * writer * ROW_TOKENS, 2.0 * reader * TEXT_TOKENS
    if command == "pretrain":
        return 6.0 * writer * config.steps * config.batch_size * config.sequence_length
    if command == "extract":
        return 2.0 * reader * sizes.corpus
    if command == "sft":
        return 3.0 * config.steps * config.batch_size * (row if config.role == "av" else text)
    if command == "eval":
        quoted = 2.0 * reader * config.quote_words * QUOTED_TOKENS
        return config.rows * (2 * row + (3 + (config.frozen_ar is not None)) * text + quoted)
    if command == "rl":
        looks = 2 + (config.algorithm.kl_coef > 0)  # sampling, the policy's log-probs, the reference's
        evaluations = config.steps // config.eval_every if config.eval_every else 0
        rollouts = config.steps * config.batch_size * config.samples_per_prompt
        return rollouts * ((looks + 3) * row + 4 * text) + evaluations * config.eval_rows * (row + text)
    return 0.0


def weights(shape: ModelShape, blocks: int | None = None) -> float:
    """N of a whole model, or of its first blocks without the output layer."""
    attention = shape.hidden_size * shape.head_dim * 2 * (shape.num_heads + shape.num_kv_heads)
    block = attention + 3 * shape.hidden_size * shape.ffn_hidden_size
    return block * shape.num_layers + shape.hidden_size * shape.vocab_size if blocks is None else block * blocks


def speed() -> float:
    """Multiplications and additions of this machine in a second, in large fp32 products, as busy as it is now."""
    import torch

    one = torch.randn(_PRODUCT, _PRODUCT)
    other, count = one.clone(), 0
    one @ other  # the first one starts threads
    begun = time.perf_counter()
    while time.perf_counter() - begun < _SECONDS:
        one @ other
        count += 1
    return 2.0 * _PRODUCT**3 * count / (time.perf_counter() - begun)


def told(stages: Sequence[tuple[str, str, Sequence[str]]], sizes: Sizes, measure: Callable[[], float] = speed) -> str:
    """In words, for stages (name, command, overrides) that are still to do."""
    width = sizes.shape.hidden_size
    rate = measure() * width / (width + _HALF_WIDTH)
    seconds = {
        name: START_SECONDS.get(command, 0) + flops(command, compose(command, list(overrides)), sizes) / rate
        for name, command, overrides in stages
    }
    parts = ", ".join(f"{name} {_told(value)}" for name, value in seconds.items() if value >= 60)
    return (
        f"This is going to take about {_told(sum(seconds.values()))} on this machine, as busy as it is now"
        f"{f' ({parts})' if parts else ''}. It can be interrupted: the same command goes on."
    )


def _told(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
