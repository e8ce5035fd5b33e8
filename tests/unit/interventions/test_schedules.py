"""Schedules against their formulas."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nla_megatron.errors import ConfigError
from nla_megatron.interventions.schedules import AXES, KINDS, Schedule


@pytest.mark.parametrize(
    ("kind", "by_hand"),
    [
        ("constant", [2.0, 2.0, 2.0, 2.0, 2.0, 2.0]),
        ("linear", [2.0, 1.5, 1.0, 0.5, 0.0, 0.0]),
        # 1 + cos(pi * t / 4), halves of its range at t = 2
        ("cosine", [2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5), 0.0, 0.0]),
    ],
)
def test_each_kind_by_hand(kind: str, by_hand: list[float]) -> None:
    schedule = Schedule(kind, start=2.0, end=0.0, steps=4)
    assert [schedule.factor(step) for step in range(6)] == pytest.approx(by_hand, abs=1e-12)
    assert len(schedule.factors()) == (1 if kind == "constant" else 5)


@given(
    st.sampled_from(KINDS), st.floats(-5, 5), st.floats(-5, 5), st.integers(1, 50), st.integers(0, 200)
)  # fmt: skip
def test_the_table_of_factors_holds_every_step(kind: str, start: float, end: float, steps: int, step: int) -> None:
    schedule = Schedule(kind, start=start, end=end, steps=steps)
    table = schedule.factors()
    assert table[min(step, len(table) - 1)] == schedule.factor(step)
    assert min(start, end) - 1e-9 <= table[-1] <= max(start, end) + 1e-9
    assert table[0] == start and (kind == "constant" or table[-1] == pytest.approx(end))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"kind": "exponential"}, "schedule.kind='exponential'"),
        ({"over": "epochs"}, "schedule.over='epochs'"),
        ({"start": float("nan")}, "schedule.start=nan"),
        ({"kind": "linear", "end": float("inf"), "steps": 3}, "schedule.end=inf"),
        ({"kind": "cosine"}, "schedule.steps=0 of a cosine"),
    ],
)
def test_a_schedule_that_cannot_be_meant_is_refused(wrong: dict, named: str) -> None:
    with pytest.raises(ConfigError, match="to do") as error:
        Schedule(**wrong)
    assert named in error.value.found
    assert {Schedule(over=axis).factor(3) for axis in AXES} == {1.0}
