"""Strided copies between buffers, and runs of them as one. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from nla_megatron.reshard.regions import Piece

PACKED = ""
"""The name of a message's own packed buffer."""


class Copy(NamedTuple):
    """A strided n-d copy; offsets and strides in elements, `PACKED` is a buffer too."""

    shape: tuple[int, ...]
    source: str
    source_offset: int
    source_strides: tuple[int, ...]
    target: str
    target_offset: int
    target_strides: tuple[int, ...]


def copy_between(source: Piece, target: Piece) -> Copy:
    """The copy of a region from one place to another."""
    return Copy(
        source.region.shape, source.buffer, source.offset, source.strides, target.buffer, target.offset, target.strides
    )


def fused(copies: Iterable[Copy]) -> list[Copy]:
    """Runs of equal copies whose offsets advance evenly on both sides become one copy with one more axis."""
    out: list[Copy] = []
    run: list[Copy] = []
    for copy in copies:
        if run and not _continues(run, copy):
            out.append(_stacked(run))
            run = []
        run.append(copy)
    return [*out, *([_stacked(run)] if run else [])]


def _continues(run: list[Copy], copy: Copy) -> bool:
    last = run[-1]
    alike = last._replace(source_offset=copy.source_offset, target_offset=copy.target_offset) == copy
    step = _step(last, copy)
    # Strides of a tensor lead forwards only.
    return alike and min(step) >= 0 and (len(run) == 1 or _step(run[0], run[1]) == step)


def _step(one: Copy, other: Copy) -> tuple[int, int]:
    return other.source_offset - one.source_offset, other.target_offset - one.target_offset


def _stacked(run: list[Copy]) -> Copy:
    first = run[0]
    if len(run) == 1:
        return first
    source, target = _step(first, run[1])
    return first._replace(
        shape=(len(run), *first.shape),
        source_strides=(source, *first.source_strides),
        target_strides=(target, *first.target_strides),
    )
