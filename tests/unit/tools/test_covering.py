"""Fewer cases of a product, and every pair of values in one of them."""

from __future__ import annotations

from itertools import combinations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.covering import WHOLE, chosen, covering

CUBE = [*product("abcd", (1, 2, 3), (True, False), "xy")]


def pairs(cases: list[tuple[object, ...]]) -> set[object]:
    return {(i, case[i], j, case[j]) for case in cases for i in range(len(case)) for j in range(i)}


def test_every_pair_is_met_by_about_as_many_cases_as_the_two_longest_factors_have() -> None:
    few = covering(CUBE, tuple)
    assert pairs(few) == pairs(CUBE)
    assert 12 <= len(few) <= 15 < len(CUBE) == 48


@given(st.sets(st.sampled_from(CUBE)))
def test_pairs_of_what_is_possible_are_met_and_nothing_else_is_tried(possible: set[tuple[object, ...]]) -> None:
    cases = sorted(possible, key=str)
    few = covering(cases, tuple)
    assert pairs(few) == pairs(cases) and set(few) <= possible
    assert few == [case for case in cases if case in few] == covering(cases, tuple)


def test_what_is_given_is_chosen_and_its_pairs_are_not_looked_for_again() -> None:
    given = [("d", 3, False, "y"), ("a", 1, True, "x")]
    few = covering(CUBE, tuple, given)
    assert set(given) <= set(few) and pairs(few) == pairs(CUBE) and len(few) <= 15


def test_of_two_factors_everything_is_needed() -> None:
    square = [*product("abc", (1, 2))]
    assert covering(square, tuple) == square


def test_a_pair_of_equal_values_of_different_factors_is_no_other_pair() -> None:
    same = [*product((1, 2), repeat=3)]
    few = covering(same, tuple)
    for first, second in combinations(range(3), 2):
        assert {(case[first], case[second]) for case in few} == {*product((1, 2), repeat=2)}


def test_whole_products_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WHOLE, raising=False)
    assert chosen(CUBE, tuple) == covering(CUBE, tuple)
    monkeypatch.setenv(WHOLE, "1")
    assert chosen(CUBE, tuple) == CUBE
