"""Which tokens are touched, whole or in chunks. Legend: B rows, T tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nla_megatron.interventions.placement import UNTOUCHED, Span, filled, mark, row_slots, touched
from nla_megatron.interventions.spec import WHERE


def is_touched(where: str, index: int, prompt: int, positions: tuple[int, ...]) -> bool:
    """One token, by the words of the specification."""
    if where == "positions":
        return index in positions
    return where == "all" or (index < prompt if where == "prompt" else index >= prompt)


def flat(where: str, span: Span, positions: tuple[int, ...]) -> list[int]:
    return sorted(index for indices in touched(where, span, positions) for index in indices)


@pytest.mark.parametrize(
    ("where", "by_hand"),
    [("positions", [1]), ("prompt", [0, 1, 2]), ("generated", [3, 4]), ("all", [0, 1, 2, 3, 4])],
)
def test_a_span_across_the_prompt_s_end_by_hand(where: str, by_hand: list[int]) -> None:
    """Tokens 7 to 11 of a request whose prompt has 10, with markers at 2, 8 and 30."""
    span = Span(first=7, count=5, prompt_tokens=10)
    assert flat(where, span, (2, 8, 30)) == by_hand
    assert span.decode_steps().tolist() == [0, 0, 0, 0, 1]


@given(st.data(), st.sampled_from(WHERE), st.integers(1, 30), st.integers(0, 12))
def test_any_cut_of_a_request_into_chunks_touches_what_the_whole_does(
    data: st.DataObject, where: str, prompt: int, generated: int
) -> None:
    """Chunked prefill, decoding token by token, and computing it all again after a preemption."""
    total = prompt + generated
    positions = tuple(data.draw(st.lists(st.integers(0, prompt - 1), unique=True, max_size=3)))
    cuts = sorted({0, total, *data.draw(st.lists(st.integers(0, total), max_size=6))})
    wanted = [index for index in range(total) if is_touched(where, index, prompt, positions)]
    chunks = [Span(begin, end - begin, prompt) for begin, end in zip(cuts, cuts[1:], strict=False)]
    assert [span.first + index for span in chunks for index in flat(where, span, positions)] == wanted
    assert flat(where, Span(0, total, prompt), positions) == wanted
    steps = np.concatenate([span.decode_steps() for span in chunks])
    assert steps.tolist() == [max(0, index - prompt) for index in range(total)]


@given(st.data(), st.sampled_from(WHERE), st.integers(1, 5))
def test_rows_and_a_flat_batch_of_spans_mark_the_same_tokens(data: st.DataObject, where: str, rows: int) -> None:
    """The trainer's padded rows against the sampler's concatenated requests."""
    prompts = data.draw(st.lists(st.integers(1, 6), min_size=rows, max_size=rows))
    lengths = [prompt + data.draw(st.integers(0, 4)) for prompt in prompts]
    positions = [(data.draw(st.integers(0, prompt - 1)),) for prompt in prompts]
    slot_BT, step_BT = row_slots(where, max(lengths) + 2, lengths, prompts, positions)
    slot_T, at, marked = np.full(sum(lengths) + 3, UNTOUCHED, dtype=np.int32), 0, []
    for row, length in enumerate(lengths):
        marked.append(mark(slot_T, where, row, at, Span(0, length, prompts[row]), positions[row]))
        at += length
    parts = [slot_BT[row, :length] for row, length in enumerate(lengths)]
    assert np.concatenate(parts).tolist() == slot_T[:at].tolist()
    assert marked == [int((part == row).sum()) for row, part in enumerate(parts)]
    assert (slot_T[at:] == UNTOUCHED).all() and (slot_BT[:, max(lengths) :] == UNTOUCHED).all()
    assert all((slot_BT[row, length:] == UNTOUCHED).all() for row, length in enumerate(lengths))
    expected = [
        [max(0, t - prompts[row]) if t < lengths[row] else 0 for t in range(max(lengths) + 2)] for row in range(rows)
    ]
    assert step_BT.tolist() == expected


@given(st.data(), st.integers(2, 4), st.integers(4, 20), st.integers(0, 6))
def test_the_i_th_position_takes_the_i_th_row_of_its_request_however_it_is_cut(
    data: st.DataObject, count: int, prompt: int, generated: int
) -> None:
    total, slot = prompt + generated, 2
    drawn = data.draw(st.lists(st.integers(0, prompt - 1), unique=True, min_size=count, max_size=count))
    cuts = sorted({0, total, *data.draw(st.lists(st.integers(0, total), max_size=4))})
    slot_T, marked = np.full(total, UNTOUCHED, dtype=np.int32), 0
    for begin, end in zip(cuts, cuts[1:], strict=False):
        marked += mark(slot_T, "positions", slot, begin, Span(begin, end - begin, prompt), drawn, count)
    assert marked == count
    assert {at: int(row) for at, row in enumerate(slot_T) if row >= 0} == {
        at: slot * count + number for number, at in enumerate(drawn)
    }
    slot_BT, _ = row_slots("positions", total, [total] * 3, [prompt] * 3, [drawn] * 3, count)
    assert slot_BT[2].tolist() == slot_T.tolist()


def test_a_row_with_fewer_vectors_than_others_has_them_last() -> None:
    slot_BT, _ = row_slots("positions", 7, [7, 7, 7], [6, 6, 6], [(4,), (5, 1), (0, 2, 3)], vectors=3)
    by_hand = [[-1, -1, -1, -1, 2, -1, -1], [-1, 5, -1, -1, -1, 4, -1], [6, -1, 7, 8, -1, -1, -1]]
    assert slot_BT.tolist() == by_hand


def test_what_a_row_lacks_is_filled_with_its_own_vector_and_counted() -> None:
    vectors = np.arange(36, dtype=np.float32).reshape(3, 3, 4)
    lacking = vectors.copy()
    lacking[0, :2] = lacking[1, :1] = np.nan
    found, counts = filled(lacking, [1, 2, 3])
    assert counts.tolist() == [1, 2, 3]
    by_hand = [vectors[0, [2, 2, 2]], vectors[1, [2, 1, 2]], vectors[2]]
    np.testing.assert_array_equal(found, by_hand)
    assert filled(vectors, [3, 3, 3])[0] is vectors


def test_nothing_is_filled_in_at_a_position_nor_between_vectors() -> None:
    lacking = np.ones((3, 3, 2), dtype=np.float32)
    lacking[0, :2] = lacking[1, 1] = lacking[2] = np.nan
    found, counts = filled(lacking, [2, 1, 0])
    assert np.isnan(found).all(-1).tolist() == [[False, True, False], [False, True, False], [True] * 3]
    # A row without a position brings its own all the same.
    assert counts.tolist() == [2, 3, 1]
