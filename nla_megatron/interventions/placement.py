"""Which tokens an intervention touches, and with which vector, for both sides that run a model.

The sampler sees spans of a request (a chunk of its prompt, then one token at a time, or all again after a preemption);
the trainer sees whole rows. Both name a span by the absolute index of its first token, so both ask the same function.
Legend: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

UNTOUCHED = -1
Rows = TypeVar("Rows", np.ndarray, "Tensor")


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of one request: `count` of them from absolute index `first`; the prompt has `prompt_tokens`.

    Example:
        >>> Span(first=4, count=3, prompt_tokens=6).decode_steps()
        array([0, 0, 0])
    """

    first: int
    count: int
    prompt_tokens: int

    def decode_steps(self) -> np.ndarray:
        """For each token how many tokens of the response come before it; 0 in the prompt. (count,) int64."""
        return np.maximum(np.arange(self.first, self.first + self.count) - self.prompt_tokens, 0)


def touched(where: str, span: Span, positions: Sequence[int] = ()) -> tuple[range, ...]:
    """The tokens of `span` that an intervention touches, as ranges of indices relative to the span's first token.

    Args:
        where: one of `spec.WHERE`.
        span: the tokens looked at.
        positions: absolute indices in the prompt, for "positions".

    Example:
        >>> touched("generated", Span(first=4, count=3, prompt_tokens=6))
        (range(2, 3),)
    """
    if where == "positions":
        relative = (position - span.first for position in positions)
        return tuple(range(index, index + 1) for index in relative if 0 <= index < span.count)
    boundary = min(max(span.prompt_tokens - span.first, 0), span.count)
    begin = boundary if where == "generated" else 0
    end = boundary if where == "prompt" else span.count
    return (range(begin, end),) if begin < end else ()


def mark(
    slot_T: np.ndarray, where: str, slot: int, at: int, span: Span, positions: Sequence[int] = (), vectors: int = 1
) -> int:
    """Write `slot` at the touched tokens of a span that begins at index `at` of the batch; how many there are.

    Args:
        slot_T: (T,) int32 or int64, changed in place; the caller fills it with `UNTOUCHED` before each batch.
        slot: the request's row in the tables.
        vectors: how many rows a request has there, one for each position: those from `slot * vectors` on, or where it
            has fewer positions, the last of them.
    """
    if vectors > 1:
        each = enumerate(positions, (slot + 1) * vectors - len(positions))
        return sum(mark(slot_T, where, row, at, span, (position,)) for row, position in each)
    count = 0
    for indices in touched(where, span, positions):
        slot_T[at + indices.start : at + indices.stop] = slot
        count += len(indices)
    return count


def taken(vectors: Rows, count: int) -> Rows:
    """What an intervention of `count` vectors takes of rows that bring one (N, E) or several (N, K, E) each.

    One is the row's own, the last: (N, E). Of several it takes all: (N, count, E).
    """
    return vectors[:, -1] if count == 1 and vectors.ndim == 3 else vectors


def filled(vectors_NKD: np.ndarray, positions: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows that bring different numbers of vectors, without the NaN that stands for those they lack.

    What no position names may hold anything finite: here the row's own vector, the last.

    Args:
        vectors_NKD: the own one last; of a row that brings fewer than K, the first ones are NaN throughout.
        positions: how many each row names. So many of its last vectors count as brought, NaN or not.

    Returns:
        (N, K, D), a copy only where something was missing, and how many each row brings (N,), at least 1.
    """
    count = vectors_NKD.shape[1]
    lacking_NK = np.logical_and.accumulate(np.isnan(vectors_NKD).all(axis=-1), axis=1)
    lacking_NK &= np.arange(count) < count - np.maximum(np.asarray(positions, dtype=np.int64), 1)[:, None]
    if not lacking_NK.any():
        return vectors_NKD, np.full(len(vectors_NKD), count)
    return np.where(lacking_NK[..., None], vectors_NKD[:, -1:], vectors_NKD), count - lacking_NK.sum(axis=1)


def row_slots(
    where: str,
    width: int,
    lengths: Sequence[int],
    prompt_tokens: Sequence[int],
    positions: Sequence[Sequence[int]] = (),
    vectors: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Slots and decode steps of right-padded rows; row b's slot is b as `mark` writes it, and padding is untouched.

    Args:
        where: one of `spec.WHERE`.
        width: T, padding included.
        lengths, prompt_tokens: of each row.
        positions: absolute indices of each row, for "positions".
        vectors: as of `mark`.

    Returns:
        slots (B, T) int32 and decode steps (B, T) int64. A rank of sequence parallelism, or one that stores tokens
        first, takes its part of them as of any other tensor of the batch.
    """
    slot_BT = np.full((len(lengths), width), UNTOUCHED, dtype=np.int32)
    step_BT = np.zeros((len(lengths), width), dtype=np.int64)
    for row, (length, prompt) in enumerate(zip(lengths, prompt_tokens, strict=True)):
        span = Span(0, length, prompt)
        mark(slot_BT[row], where, row, 0, span, positions[row] if positions else (), vectors)
        step_BT[row, :length] = span.decode_steps()
    return slot_BT, step_BT
