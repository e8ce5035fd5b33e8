"""Terms to one reward, by hand: sums, the product with its gate, and weights that change once."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nla_megatron.config.schema import RewardConfig
from nla_megatron.errors import ConfigError
from nla_megatron.rewards import make_reward
from tests.support.measured import measured

PARTS: dict[str, Any] = {
    "correctness": {"weight": 2.0},
    "length": {"weight": 0.5},
    "format": {},
    "utilisation": {"term": "correctness", "weight": 0.25, "options": {"value": "used"}},
}
# Lengths 2 and 6 are well-formed, so their mean is 4 and the first one's relative length is 0.5.
SEEN = measured(["a", "b", None, None], lengths=[2, 6, 1, 9], correct=[1, 0, 1, 0], used=[1, -1, 0, 4])
LENGTHS = [0.5, 0.0, 0.0, 0.0]


def rewards(**keys: Any) -> list[float]:
    return make_reward(RewardConfig(**{"terms": PARTS, **keys}))(SEEN, 0).rewards.tolist()


def test_the_sum_by_hand() -> None:
    assert rewards() == [
        2 * 1 + 0.5 * 0.5 + 1 + 0.25 * 1,
        2 * 0 + 0.5 * 0.0 + 1 - 0.25 * 1,
        2 * 1 + 0.0 + 0 + 0,
        0 + 0.0 + 0 + 0.25 * 4,
    ]


@pytest.mark.parametrize("product", ["correctness_length", "correctness_length_format"])
def test_the_product_by_hand(product: str) -> None:
    """A wrong answer gains nothing by being short; form and utilisation are added."""
    found = rewards(composition="weighted_length_penalty", product=product)
    assert found == [2 + 0.5 * 1 * 0.5 + 1 + 0.25, 0 + 0 + 1 - 0.25, 2 + 0 + 0, 0 + 0 + 0 + 1]


@pytest.mark.parametrize(("product", "expected"), [("correctness_length", 1.25), ("correctness_length_format", 1.0)])
def test_the_product_with_form_leaves_out_the_length_of_what_has_none(product: str, expected: float) -> None:
    """Where a task's own format is stricter than having an answer, the two products differ: 1 + 0.5·(1·0.5[·0])."""
    seen = measured(["a", "b"], lengths=[2, 6], correct=[1, 0], strict=[0, 1])
    terms = {"correctness": {}, "length": {"weight": 0.5}, "format": {"options": {"value": "strict"}}}
    config = RewardConfig(terms, composition="weighted_length_penalty", product=product)
    assert make_reward(config)(seen, 0).rewards.tolist() == [expected, 1.0]


@pytest.mark.parametrize("composition", ["additive", "weighted_length_penalty"])
def test_the_gate_replaces_everything_of_a_response_without_form(composition: str) -> None:
    free = rewards(composition=composition)
    assert rewards(composition=composition, strict_format_gate=True) == [*free[:2], -1.0, -1.0]
    gated = rewards(composition=composition, strict_format_gate=True, non_strict_penalty=-0.5)
    assert gated == [*free[:2], -0.5, -0.5]


def test_each_term_is_told_as_it_is_before_its_weight() -> None:
    terms = make_reward(RewardConfig(PARTS, composition="weighted_length_penalty"))(SEEN, 0).terms
    assert {label: values.tolist() for label, values in terms.items()} == {
        "correctness": [1, 0, 1, 0],
        "length": LENGTHS,
        "format": [1, 1, 0, 0],
        "utilisation": [1, -1, 0, 4],
    }


@given(st.lists(st.floats(-5, 5, width=32), min_size=4, max_size=4), st.floats(-3, 3), st.floats(0.1, 3))
def test_a_sum_is_linear_in_its_weights(values: list[float], shift: float, factor: float) -> None:
    seen = measured(["a"] * 4, correct=values, one=[1.0] * 4)
    terms = {"correctness": {"weight": factor}, "shift": {"term": "format", "weight": shift}}
    found = make_reward(RewardConfig(terms))(seen, 0).rewards.tolist()
    assert found == pytest.approx([factor * value + shift for value in values], abs=1e-5)


class TestSchedule:
    def weights(self, steps: int, steps_per_epoch: float | None = None, **part: Any) -> list[float]:
        terms = {"correctness": {"weight": 1.0, "later_weight": 3.0, **part}}
        reward = make_reward(RewardConfig(terms), steps_per_epoch)
        seen = measured(["a"], correct=[1])
        found = [reward(seen, step).rewards.item() for step in range(steps)]
        assert found == [reward.weights(step)["correctness"] for step in range(steps)]
        return found

    def test_by_step(self) -> None:
        assert self.weights(4, change_at=2) == [1, 1, 3, 3]
        assert self.weights(2, change_at=0) == [3, 3]

    def test_by_epoch(self) -> None:
        """Ten rows in steps of four: the steps begin at rows 0, 4, 8, 12, …; the second epoch at row 10."""
        assert self.weights(5, 10 / 4, change_at=1, change_by="epoch") == [1, 1, 1, 3, 3]
        assert self.weights(6, 5 / 2, change_at=2, change_by="epoch") == [1, 1, 1, 1, 1, 3]

    def test_a_step_that_begins_an_epoch_belongs_to_it(self) -> None:
        for steps in range(1, 60):
            found = self.weights(2 * steps + 1, (7 * steps) / 7, change_at=2, change_by="epoch")
            assert found == [1] * (2 * steps) + [3]

    def test_both_weights_of_the_product_change(self) -> None:
        """The two-stage run: first correctness alone, then length too."""
        terms = {
            "correctness": {"weight": 1.0, "later_weight": 0.5, "change_at": 1, "change_by": "epoch"},
            "length": {"weight": 0.0, "later_weight": 2.0, "change_at": 1, "change_by": "epoch"},
        }
        reward = make_reward(RewardConfig(terms, composition="weighted_length_penalty"), 3)
        assert [reward(SEEN, step).rewards.tolist()[:2] for step in (0, 2, 3)] == [[1, 0], [1, 0], [0.5 + 2 * 0.5, 0]]

    def test_epochs_without_a_table_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="reward.terms.correctness.change_by=epoch"):
            self.weights(1, None, change_at=1, change_by="epoch")

    @pytest.mark.parametrize(
        ("part", "found"),
        [
            ({"change_at": None}, "later_weight=3.0 with change_at=None"),
            ({"later_weight": None, "change_at": 3}, "later_weight=None with change_at=3"),
            ({"change_at": -1}, "change_at=-1"),
            ({"change_at": 1, "change_by": "day"}, "change_by='day'"),
            ({"change_at": 1, "weight": math.nan}, "weight=nan"),
            ({"change_at": 1, "later_weight": math.inf}, "later_weight=inf"),
            ({"change_at": 1, "weight": "much"}, "weight: Value 'much'"),
            ({"change_at": 1, "wait": 3}, r"reward\.terms\.correctness\.wait"),
        ],
    )
    def test_weights_that_cannot_be_meant_are_refused(self, part: dict[str, Any], found: str) -> None:
        with pytest.raises(ConfigError, match=found):
            self.weights(1, **part)


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ({"terms": {}}, "has nothing"),
        ({"composition": "median"}, "reward.composition='median'"),
        ({"product": "length"}, "reward.product='length'"),
        ({"non_strict_penalty": math.nan}, "reward.non_strict_penalty=nan"),
        ({"terms": {"format": {}}, "composition": "weighted_length_penalty"}, "has format"),
        ({"terms": {"correctness": {}}, "strict_format_gate": True}, r"has correctness[\s\S]*format too"),
        ({"terms": {"correctness": 3}}, "reward.terms.correctness=3"),
    ],
)
def test_parts_that_do_not_fit_are_refused(keys: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        make_reward(RewardConfig(**{"terms": PARTS, **keys}))


def test_the_product_with_form_needs_the_form() -> None:
    terms = {"correctness": {}, "length": {}}
    config = RewardConfig(terms, composition="weighted_length_penalty", product="correctness_length_format")
    with pytest.raises(ConfigError, match=r"format too"):
        make_reward(config)
