"""Every row of a batch is on exactly one data-parallel rank, once; masks and padding by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nla_megatron.errors import ColumnError
from nla_megatron.models.batching import Batch, microbatches, next_token_targets, response_mask, shares
from tests.support.worlds import world_of

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=40)


@given(LENGTHS, st.integers(1, 5), st.integers(1, 7))
def test_every_row_is_in_one_share_once_and_all_ranks_have_as_many_microbatches(
    lengths: list[int], dp: int, micro: int
) -> None:
    parts = [shares(lengths, world_of(dp=dp, dp_rank=rank), micro) for rank in range(dp)]
    rows = Counter(row for share in parts for part in share for row in part)
    padding = rows.pop(-1, 0)
    assert rows == Counter(range(len(lengths)))
    assert padding < dp * micro, "never a whole step of padding"
    assert {len(share) for share in parts} == {-(-len(lengths) // (dp * micro))}
    assert {len(part) for share in parts for part in share} == {micro}


@given(LENGTHS, st.integers(1, 5), st.integers(1, 7))
def test_ranks_have_about_as_many_tokens_as_each_other(lengths: list[int], dp: int, micro: int) -> None:
    """Rows are dealt by length: two ranks differ by no more than the longest row, microbatch by microbatch."""
    parts = [shares(lengths, world_of(dp=dp, dp_rank=rank), micro) for rank in range(dp)]
    tokens = [sum(lengths[row] for part in share for row in part if row >= 0) for share in parts]
    assert max(tokens) - min(tokens) <= max(lengths)


def batch_of(lengths: Sequence[int], **fields: torch.Tensor) -> Batch:
    return Batch([[10 * row + at + 1 for at in range(length)] for row, length in enumerate(lengths)], fields)


def test_a_microbatch_by_hand() -> None:
    """Rows of 1, 3 and 2 tokens, two to a microbatch: the longest come first, the last microbatch is filled up."""
    mask = torch.tensor([[1.0, 0, 0], [1, 1, 0], [1, 0, 0]])
    batch = batch_of([1, 3, 2], mask=mask, advantages=torch.tensor([0.5, -1.0, 2.0]))
    first, second = microbatches(batch, world_of(), 2)
    assert first.ids.tolist() == [[11, 12, 13], [21, 22, 0]]
    assert (first.rows.tolist(), first.lengths.tolist(), first.weights.tolist()) == ([1, 2], [3, 2], [1.0, 1.0])
    assert first.fields["mask"].tolist() == [[1, 1, 0], [1, 0, 0]] and first.fields["advantages"].tolist() == [
        -1.0,
        2.0,
    ]
    assert second.ids.tolist() == [[1], [1]] and second.weights.tolist() == [1.0, 0.0]
    assert second.fields["mask"].tolist() == [[1.0], [1.0]]


@given(LENGTHS, st.integers(1, 4), st.integers(1, 5), st.sampled_from([1, 2]))
def test_sums_over_weighted_rows_are_those_of_the_batch(lengths: list[int], dp: int, micro: int, pp: int) -> None:
    """What every loss relies on: padding rows weigh nothing, padding tokens are beyond `lengths`."""
    batch, total, widths = batch_of(lengths), 0.0, set()
    for rank in range(dp):
        for part in microbatches(batch, world_of(dp=dp, dp_rank=rank, pp=pp), micro):
            inside = torch.arange(part.ids.shape[1])[None] < part.lengths[:, None]
            assert not part.ids[~inside].any()
            total += float((part.ids * part.weights[:, None]).sum())
            widths.add(part.ids.shape[1])
    assert total == sum(sum(row) for row in batch.ids)
    assert pp == 1 or widths == {max(lengths)}, "pipeline stages exchange tensors of one shape"


def test_vectors_are_read_only_for_the_rows_of_this_rank() -> None:
    asked: list[int] = []

    def vectors(rows: Sequence[int]) -> np.ndarray:
        asked.extend(rows)
        return np.asarray([[row + 1.0, 0.0] for row in rows], dtype=np.float32)

    batch = Batch([[1, 2]] * 4, positions=[0, 1, 0, 1], vectors=vectors)
    [part] = microbatches(batch, world_of(dp=2, dp_rank=1), 2)
    assert sorted(asked) == [1, 3] == part.rows.tolist()
    assert part.injection is not None and part.injection.positions == ((1,), (1,))
    assert part.vectors is not None and part.vectors[:, 0].tolist() == [2.0, 4.0]


def test_vectors_without_positions_are_targets_not_injections() -> None:
    [part] = microbatches(Batch([[1]], vectors=lambda rows: np.ones((len(rows), 2), np.float32)), world_of(), 1)
    assert part.vectors is not None and part.injection is None


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_vector_without_a_direction_stops_the_step(bad: float) -> None:
    batch = Batch([[1], [2]], vectors=lambda rows: np.asarray([[1.0, 1.0], [bad, bad]], np.float32)[list(rows)])
    with pytest.raises(ColumnError, match="1 activations that are zero or not finite"):
        microbatches(batch, world_of(), 2)


def test_the_mask_marks_the_positions_that_predict_the_response() -> None:
    """Prompts of 2 tokens; responses of 3, of 1 and of none. Position t predicts token t + 1."""
    assert response_mask([2, 2, 2], [5, 3, 2], 6).tolist() == [[0, 1, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0], [0] * 6]


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(0, 8)), min_size=1, max_size=8))
def test_masked_targets_are_the_response_and_nothing_else(sizes: list[tuple[int, int]]) -> None:
    prompts, lengths = [prompt for prompt, _ in sizes], [prompt + response for prompt, response in sizes]
    ids = torch.zeros(len(sizes), max(lengths), dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.arange(1, length + 1)
    targets, mask = next_token_targets(ids), response_mask(prompts, lengths, ids.shape[1]).bool()
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        assert targets[row][mask[row]].tolist() == list(range(prompt + 1, length + 1))


@pytest.mark.parametrize("bad", [0.0, float("nan")])
def test_a_vector_without_a_direction_among_several_of_a_row_stops_the_step(bad: float) -> None:
    vectors = np.ones((2, 3, 2), np.float32)
    batch = Batch([[1, 2, 3]] * 2, positions=[(0, 1, 2)] * 2, vectors=lambda rows: vectors[list(rows)])
    [part] = microbatches(batch, world_of(), 2)
    assert part.injection is not None and part.injection.vectors is not None
    assert part.injection.vectors.shape == (2, 3, 2)
    vectors[1, 0] = bad
    with pytest.raises(ColumnError, match="1 activations that are zero or not finite"):
        microbatches(batch, world_of(), 2)


def test_rows_of_one_to_three_vectors_share_a_microbatch_and_say_how_many_they_bring() -> None:
    vectors = np.arange(1, 19, dtype=np.float32).reshape(3, 3, 2)
    vectors[0, :2] = vectors[1, :1] = np.nan
    places = [(2,), (0, 1), (0, 1, 2)]
    batch = Batch([[1, 2, 3]] * 3, positions=places, vectors=lambda rows: vectors[list(rows)])
    [part] = microbatches(batch, world_of(), 3)
    assert part.injection is not None and part.vectors is not None
    assert part.injection.brought == (1, 2, 3) and part.injection.positions == tuple(places)
    assert torch.isfinite(part.vectors).all()
    for row, count in enumerate((1, 2, 3)):
        np.testing.assert_array_equal(part.vectors[row, 3 - count :].numpy(), vectors[row, 3 - count :])
    with pytest.raises(ColumnError, match="1 activations that are zero or not finite"):
        microbatches(replace(batch, positions=[(0, 1), *places[1:]]), world_of(), 3)
