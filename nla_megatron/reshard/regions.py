"""Strided n-d regions of named tensors: which elements, and where they lie in a buffer. Pure: no tensor, no engine.

An axis of a region is a Python `range`: first index, end, step. Two ranges meet in a range again, so regions are closed
under intersection, and their difference is a list of regions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd, prod

Axes = tuple[range, ...]


def common(a: range, b: range) -> range:
    """The numbers in both (steps are positive): by the Chinese remainder theorem again evenly spaced."""
    low, stop = max(a.start, b.start), min(a.stop, b.stop)
    if a.step == b.step == 1:
        return range(low, stop)
    divisor = gcd(a.step, b.step)
    if (b.start - a.start) % divisor:
        return range(0)
    step, turns = a.step * b.step // divisor, b.step // divisor
    first = a.start + a.step * ((b.start - a.start) // divisor * pow(a.step // divisor, -1, turns) % turns)
    return range(first + -(-(low - first) // step) * step, stop, step)


def without(a: range, part: range) -> Iterator[range]:
    """The numbers of `a` that are not in `part`, which is `common(a, …)` and not empty."""
    yield range(a.start, part.start, a.step)
    for offset in range(part.start + a.step, part.start + part.step, a.step):
        yield range(offset, part[-1], part.step)
    yield range(part[-1] + a.step, a.stop, a.step)


@dataclass(frozen=True, slots=True)
class Region:
    """Elements of the tensor `name`: those whose index on every axis is in its range. None of the ranges is empty.

    Example: every second row of the right half of an 8 x 6 matrix:
        >>> Region("w", (range(0, 8, 2), range(3, 6))).size
        12
    """

    name: str
    axes: Axes

    def __str__(self) -> str:
        spans = (f"{a.start}:{a.stop}" + (f":{a.step}" if a.step > 1 else "") for a in self.axes)
        return f"{self.name}[{', '.join(spans)}]"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(len, self.axes))

    @property
    def size(self) -> int:
        return prod(map(len, self.axes))

    def intersect(self, other: Region) -> Region | None:
        """The elements in both; None where there are none."""
        if self.name != other.name:
            return None
        assert len(self.axes) == len(other.axes), f"{self.name} has {len(self.axes)} axes and {len(other.axes)}"
        axes = []
        for mine, theirs in zip(self.axes, other.axes, strict=True):
            both = mine if mine == theirs else common(mine, theirs)
            if not both:
                return None
            axes.append(both)
        return Region(self.name, tuple(axes))

    def subtract(self, other: Region) -> list[Region]:
        """The elements that are not in `other`, as regions without common elements."""
        both = self.intersect(other)
        if both is None:
            return [self]
        return [
            Region(self.name, (*both.axes[:axis], rest, *self.axes[axis + 1 :]))
            for axis, whole in enumerate(self.axes)
            for rest in without(whole, both.axes[axis])
            if rest
        ]

    def chunks(self, most: int) -> Iterator[Region]:
        """The region in order, in parts of at most `most` elements (or one element), cut along the first axes."""
        if self.size <= most or self.size == 1:
            yield self
            return
        axis = next(axis for axis, one in enumerate(self.axes) if len(one) > 1)
        rows = max(1, most // (self.size // len(self.axes[axis])))
        for start in range(0, len(self.axes[axis]), rows):
            part = self.axes[axis][start : start + rows]
            yield from Region(self.name, (*self.axes[:axis], part, *self.axes[axis + 1 :])).chunks(most)


def whole(name: str, shape: Sequence[int]) -> Region:
    """All of a tensor."""
    return Region(name, tuple(range(size) for size in shape))


def missing(region: Region, parts: Sequence[Region]) -> list[Region]:
    """What of `region` is in none of `parts`."""
    left = [region]
    for part in parts:
        left = [rest for one in left for rest in one.subtract(part)]
    return left


def overlap(regions: Sequence[Region]) -> tuple[Region, Region] | None:
    """Two regions of one tensor that have elements in common; None where all are disjoint.

    Swept along the axis that most of them are cut on, so that shards cost about n log n.
    """
    if not regions:
        return None
    starts = [len({one.axes[axis].start for one in regions}) for axis in range(len(regions[0].axes))]
    axis = starts.index(max(starts)) if starts else 0
    open_regions: list[Region] = []
    for region in sorted(regions, key=lambda one: one.axes[axis].start) if starts else regions:
        if starts:
            open_regions = [one for one in open_regions if one.axes[axis].stop > region.axes[axis].start]
        for one in open_regions:
            if one.intersect(region) is not None:
                return one, region
        open_regions.append(region)
    return None


@dataclass(frozen=True, slots=True)
class Piece:
    """A region and where it lies: element `i` (counted within the region) at offset + sum(i * strides) of `buffer`.

    Units are elements; `strides` has one entry per axis.
    """

    region: Region
    buffer: str
    offset: int
    strides: tuple[int, ...]

    @property
    def last(self) -> int:
        """The place of its last element in the buffer; strides lead forwards."""
        return self.offset + sum(
            (len(one) - 1) * step for one, step in zip(self.region.axes, self.strides, strict=True)
        )

    def within(self, part: Region) -> Piece:
        """The same for a part of the region."""
        if part == self.region:
            return self
        offset, strides = self.offset, []
        for mine, its, stride in zip(self.region.axes, part.axes, self.strides, strict=True):
            offset += (its.start - mine.start) // mine.step * stride
            strides.append(its.step // mine.step * stride)
        return Piece(part, self.buffer, offset, tuple(strides))


def between(piece: Piece, start: int, stop: int) -> Iterator[Piece]:
    """The parts of a piece that lie at places `start` to `stop` of its buffer; its axes are row-major there.

    A matrix gives at most three: what is left of a row, whole rows, the beginning of a row.
    """
    region, first = piece.region, piece.offset
    spans = [(len(one) - 1) * stride for one, stride in zip(region.axes, piece.strides, strict=True)]
    last = piece.last
    if first >= stop or last < start:
        return
    if start <= first and last < stop:
        yield piece
        return
    axis = next(axis for axis, span in enumerate(spans) if span)
    rows, stride, within = region.axes[axis], piece.strides[axis], last - first - spans[axis]
    begins, ends = max(0, -(-(start - first) // stride)), max(0, (stop - 1 - within - first) // stride + 1)
    cut = [rows[begins - 1 : begins] if begins else range(0), rows[begins:ends], rows[ends : ends + 1]]
    # Where both ends lie in one row, it is the only one.
    for part in cut[:1] if begins > ends else cut:
        if part:
            axes = (*region.axes[:axis], part, *region.axes[axis + 1 :])
            yield from between(piece.within(Region(region.name, axes)), start, stop)


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a row-major tensor, in elements."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)
