"""The controls of an evaluation are what they say they are."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nla_megatron.evaluation.held_out import deranged


@given(st.sets(st.integers(0, 10_000), min_size=2, max_size=40), st.integers(0, 9))
def test_in_the_shuffled_control_each_row_is_once_and_none_at_its_own_place(rows: set[int], seed: int) -> None:
    own = sorted(rows)
    turned = deranged(own, seed)
    assert sorted(turned) == own
    assert all(mine != another for mine, another in zip(own, turned, strict=True))
    assert deranged(own, seed) == turned, "a repeated evaluation has the same control"
