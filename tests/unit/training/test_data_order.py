"""The rows of a step are a function of (seed, step), and every epoch sees every row once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nla_megatron.training.data_order import rows_of_step


@given(n_rows=st.integers(1, 30), batch_size=st.integers(1, 40), seed=st.integers(0, 99), epochs=st.integers(1, 3))
def test_every_epoch_is_a_permutation_of_all_rows(n_rows: int, batch_size: int, seed: int, epochs: int) -> None:
    """Also where batches straddle epochs, and where a batch is larger than the table."""
    steps = -(-n_rows * epochs // batch_size)
    stream = [row for step in range(steps) for row in rows_of_step(n_rows, batch_size, step, seed)]
    assert len(stream) == steps * batch_size
    for epoch in range(epochs):
        assert sorted(stream[epoch * n_rows : (epoch + 1) * n_rows]) == list(range(n_rows))


@given(step=st.integers(0, 50), small=st.integers(1, 8), factor=st.integers(2, 4))
def test_another_batch_size_cuts_the_same_stream(step: int, small: int, factor: int) -> None:
    parts = [rows_of_step(17, small, step * factor + part, 3) for part in range(factor)]
    assert [row for part in parts for row in part] == rows_of_step(17, small * factor, step, 3)


def test_a_step_needs_no_history() -> None:
    """A resumed run goes on with the rows it would have seen."""
    assert rows_of_step(1000, 8, 12_345, 0) == rows_of_step(1000, 8, 12_345, 0)
    assert [type(row) for row in rows_of_step(10, 2, 0, 0)] == [int, int]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [tuple(rows_of_step(50, 50, epoch, seed)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9
