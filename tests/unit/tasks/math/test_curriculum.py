"""Mixtures of problems: proportions, stages, and that everything is a function of seed, step and rows."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from nla_megatron.errors import ConfigError
from nla_megatron.tasks.math.curriculum import Mixture, Stage
from nla_megatron.tasks.math.generator import WordProblems
from nla_megatron.training.data_order import rows_of_step

SOURCES = {"easy": WordProblems(size=300, levels=(1,)), "hard": WordProblems(size=100, levels=(3,))}
PROMPTS = 16


def mixture(weights: dict[str, float], stages: tuple[Stage, ...] = (), **options: Any) -> Mixture:
    return Mixture(SOURCES, weights, stages, **options)


def sources(mixed: Mixture, step: int, seed: int = 0) -> Counter[str]:
    rows = rows_of_step(len(mixed), PROMPTS, step, seed)
    return Counter(mixed.names[mixed.source_of(row)] for row in mixed.choose(rows, step))


def test_rows_number_the_problems_of_all_sources_in_order() -> None:
    mixed = mixture({"easy": 1, "hard": 1})
    assert len(mixed) == 400
    assert mixed.problem(0) == SOURCES["easy"].problem(0) and mixed.problem(299) == SOURCES["easy"].problem(299)
    assert mixed.problem(300) == SOURCES["hard"].problem(0) and mixed.problem(399) == SOURCES["hard"].problem(99)


def test_each_step_has_the_floor_or_ceiling_of_each_share_and_the_run_the_share_itself() -> None:
    mixed, steps = mixture({"easy": 3, "hard": 1.7}), 400
    share = 1.7 / 4.7
    hard = [sources(mixed, step)["hard"] for step in range(steps)]
    assert set(hard) == {int(PROMPTS * share), int(PROMPTS * share) + 1}
    # The spread of a rounding up or down, over as many steps.
    assert abs(np.mean(hard) - PROMPTS * share) < 4 * 0.5 / steps**0.5


def test_a_source_of_weight_zero_is_never_asked() -> None:
    mixed = mixture({"easy": 1})
    assert all(sources(mixed, step) == {"easy": PROMPTS} for step in range(50))


def test_stages_change_the_weights_at_their_steps() -> None:
    stages = (Stage({"easy": 1, "hard": 1}, from_step=10), Stage({"hard": 1}, from_step=20))
    mixed = mixture({"easy": 1}, stages)
    assert [sources(mixed, step)["hard"] for step in (0, 9, 10, 19, 20, 1000)] == [0, 0, 8, 8, 16, 16]


def test_a_further_draw_of_a_step_stands_where_the_step_does() -> None:
    mixed = mixture({"easy": 1}, (Stage({"hard": 1}, from_step=10),))
    rows = list(range(PROMPTS))
    first, again = mixed.choose(rows, 3), mixed.choose(rows, 503, at=3)
    assert {mixed.source_of(row) for row in again} == {0}
    assert {mixed.source_of(row) for row in mixed.choose(rows, 503)} == {1}
    assert set(first) == set(again) == set(rows)


def test_stages_by_epoch_begin_when_all_problems_could_have_been_seen() -> None:
    mixed = mixture({"easy": 1}, (Stage({"hard": 1}, from_epoch=1),))
    first = len(mixed) // PROMPTS
    assert sources(mixed, first - 1) == {"easy": PROMPTS} and sources(mixed, first) == {"hard": PROMPTS}


def test_blended_stages_move_linearly() -> None:
    mixed = mixture({"easy": 1}, (Stage({"hard": 1}, from_step=10),), blend=True)
    assert [float(mixed.share(step, PROMPTS)[1]) for step in (0, 5, 10, 20)] == pytest.approx([0.0, 0.5, 1.0, 1.0])
    assert sources(mixed, 5) == {"easy": 8, "hard": 8}


def test_the_choice_depends_on_seed_step_and_rows_alone() -> None:
    rows = list(range(40, 40 + PROMPTS))
    weights = {"easy": 1.0, "hard": 1.0}
    once = mixture(weights, seed=3).choose(rows, 7)
    assert once == mixture(weights, seed=3).choose(rows, 7)
    assert once != mixture(weights, seed=4).choose(rows, 7)
    assert once != mixture(weights, seed=3).choose(rows, 8)
    assert once != mixture(weights, seed=3).choose([row + 1 for row in rows], 7)


def test_no_problem_comes_twice_in_a_step_while_there_are_others() -> None:
    mixed = mixture({"hard": 1})
    rows = [5, 105, 205, 305, *range(10, 90)]
    assert len(set(mixed.choose(rows, 0))) == len(rows)
    tiny = Mixture({"a": WordProblems(size=2), "b": WordProblems(size=2)}, {"a": 1})
    assert Counter(tiny.choose([0, 1, 2, 3], 0)).keys() == {0, 1}


def test_every_problem_of_every_source_is_seen_in_the_long_run() -> None:
    mixed = mixture({"easy": 1, "hard": 1})
    seen = {row for step in range(400) for row in mixed.choose(rows_of_step(400, PROMPTS, step, 0), step)}
    assert seen == set(range(400))


def test_a_single_source_takes_the_rows_as_they_are() -> None:
    assert Mixture({"all": SOURCES["easy"]}, {"all": 1}).choose([5, 3, 299], 4) == [5, 3, 299]


@pytest.mark.parametrize(
    ("weights", "stages", "named"),
    [
        ({"easy": 0.0}, (), "weights"),
        ({"easy": -1.0, "hard": 2.0}, (), "weights"),
        ({"easy": float("nan")}, (), "weights"),
        ({"medium": 1.0}, (), "'medium'"),
        ({"easy": 1.0}, (Stage({"medium": 1.0}, from_step=3),), "'medium'"),
        ({"easy": 1.0}, (Stage({"hard": 1.0}, from_step=3), Stage({"hard": 1.0}, from_step=3)), "[3, 3]"),
        ({"easy": 1.0}, (Stage({"hard": 1.0}),), "from_step=None"),
        ({"easy": 1.0}, (Stage({"hard": 1.0}, from_step=3), Stage({"hard": 1.0}, from_epoch=9)), "from_epoch"),
        ({"easy": 1.0}, (Stage({"hard": 1.0}, from_step=0),), "from_step=0"),
    ],
)
def test_weights_and_stages_that_make_no_sense_are_named(
    weights: dict[str, float], stages: tuple[Stage, ...], named: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        mixture(weights, stages)
    assert named in caught.value.found
