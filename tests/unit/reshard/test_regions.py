"""Region algebra against sets of indices, over random strided regions."""

from __future__ import annotations

from itertools import product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nla_megatron.reshard.regions import Piece, Region, between, common, contiguous, missing, overlap, whole, without


def spans(most: int = 12) -> st.SearchStrategy[range]:
    return st.builds(
        lambda start, length, step: range(start, start + length, step),
        st.integers(0, most - 1), st.integers(1, most), st.integers(1, 5),
    )  # fmt: skip


@st.composite
def regions(draw: st.DrawFn, axes: int = 2) -> Region:
    return Region("w", tuple(draw(spans()) for _ in range(axes)))


def elements(*several: Region) -> list[tuple[int, ...]]:
    return [index for one in several for index in product(*one.axes)]


@given(spans(30), spans(30))
def test_common_and_without_split_a_range(a: range, b: range) -> None:
    both = common(a, b)
    assert set(both) == set(a) & set(b)
    if both:
        rest = [number for one in without(a, both) for number in one]
        assert sorted([*rest, *both]) == sorted(a)


@given(regions(), regions())
def test_intersection_and_difference_partition_a_region(a: Region, b: Region) -> None:
    both, rest = a.intersect(b), a.subtract(b)
    assert set(elements(*([both] if both else []))) == set(elements(a)) & set(elements(b))
    assert sorted(elements(*rest, *([both] if both else []))) == sorted(elements(a))
    assert both is None or both.size == len(elements(both))


@given(regions(), st.lists(regions(), max_size=4))
def test_missing_is_what_no_part_covers(region: Region, parts: list[Region]) -> None:
    assert sorted(elements(*missing(region, parts))) == sorted(set(elements(region)) - set(elements(*parts)))


@given(st.lists(regions(), max_size=5))
def test_overlap_is_found_exactly_where_an_element_is_twice(several: list[Region]) -> None:
    everything, found = elements(*several), overlap(several)
    assert (found is not None) == (len(everything) != len(set(everything)))
    assert found is None or set(elements(found[0])) & set(elements(found[1]))


@given(regions(3), st.integers(1, 40))
def test_chunks_keep_order_and_size(region: Region, most: int) -> None:
    parts = list(region.chunks(most))
    assert elements(*parts) == elements(region)
    assert all(part.size <= most for part in parts)


@given(regions(3), regions(3))
def test_a_piece_finds_its_part_where_the_whole_had_it(region: Region, other: Region) -> None:
    part = region.intersect(other)
    if part is None:
        return
    buffer = np.arange(7 + 2 * region.size)
    piece = Piece(region, "b", 7, tuple(2 * stride for stride in contiguous(region.shape)))

    def read(piece: Piece) -> dict[tuple[int, ...], int]:
        view = np.lib.stride_tricks.as_strided(
            buffer[piece.offset :], piece.region.shape, [stride * buffer.itemsize for stride in piece.strides]
        )
        return dict(zip(elements(piece.region), view.flatten().tolist(), strict=True))

    assert read(piece.within(part)).items() <= read(piece).items()


@given(regions(3), st.integers(0, 40), st.integers(-5, 300), st.integers(0, 9) | st.integers(0, 300), st.booleans())
def test_between_is_what_lies_in_a_flat_range_of_the_buffer(
    region: Region, gap: int, start: int, length: int, spread: bool
) -> None:
    # Rows may lie apart, as those of a parameter with neighbours do.
    strides = [(2 if spread else 1) * stride for stride in contiguous(region.shape)]
    strides[0] += gap
    piece, stop = Piece(region, "b", 7, tuple(strides)), start + length

    def places(piece: Piece) -> list[tuple[tuple[int, ...], int]]:
        counts = product(*(range(size) for size in piece.region.shape))
        steps = (sum(n * step for n, step in zip(one, piece.strides, strict=True)) for one in counts)
        return list(zip(elements(piece.region), (piece.offset + step for step in steps), strict=True))

    found = [one for part in between(piece, start, stop) for one in places(part)]
    assert found == [(index, place) for index, place in places(piece) if start <= place < stop]


def test_other_names_do_not_meet_and_a_whole_tensor_is_covered_by_its_shards() -> None:
    assert Region("a", (range(3),)).intersect(Region("b", (range(3),))) is None
    shards = [Region("w", (range(8), range(half, half + 3))) for half in (0, 3)]
    assert missing(whole("w", (8, 6)), shards) == [] and overlap(shards) is None
    assert missing(whole("w", (8, 7)), shards) == [Region("w", (range(8), range(6, 7)))]
    assert whole("scalar", ()).size == 1
