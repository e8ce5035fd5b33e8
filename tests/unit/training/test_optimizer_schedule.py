"""The learning rate at every corner of the schedule."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nla_megatron.config.schema import OptimConfig
from nla_megatron.training.optimizer import learning_rate

CONFIG = OptimConfig(lr=1.0, min_lr_ratio=0.1, warmup_steps=10)


def test_warm_up_is_linear_and_its_first_step_moves() -> None:
    assert [learning_rate(CONFIG, step, 111) for step in range(10)] == pytest.approx([0.1 * n for n in range(1, 11)])


def test_the_peak_the_middle_and_the_end_of_the_cosine() -> None:
    """111 steps: the peak at step 10, half way at 60, the last step 110 at the floor."""
    assert learning_rate(CONFIG, 10, 111) == 1.0
    assert learning_rate(CONFIG, 60, 111) == pytest.approx(0.55)
    assert learning_rate(CONFIG, 110, 111) == pytest.approx(0.1)


def test_the_rate_stays_at_the_floor_beyond_the_end() -> None:
    assert learning_rate(CONFIG, 10_000, 111) == pytest.approx(0.1)


def test_a_constant_schedule_still_warms_up() -> None:
    config = OptimConfig(lr=2.0, warmup_steps=4, schedule="constant")
    assert [learning_rate(config, step, 8) for step in range(8)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0]


@given(
    steps=st.integers(1, 60),
    warmup=st.integers(0, 80),
    ratio=st.floats(0, 1),
    schedule=st.sampled_from(["cosine", "constant"]),
)
def test_the_rate_is_positive_never_above_the_peak_and_falls_after_it(
    steps: int, warmup: int, ratio: float, schedule: str
) -> None:
    """Also for a warm-up as long as the run, and for a run of one step."""
    config = OptimConfig(lr=3.0, min_lr_ratio=ratio, warmup_steps=warmup, schedule=schedule)
    rates = [learning_rate(config, step, steps) for step in range(steps)]
    assert all(min(3.0 * ratio, 3.0 / max(1, warmup)) - 1e-9 <= rate <= 3.0 + 1e-9 for rate in rates)
    assert sorted(rates[:warmup]) == rates[:warmup]
    assert all(a >= b - 1e-12 for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False))
