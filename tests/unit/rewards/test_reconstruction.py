"""The NLA reward by hand for each transform and option, and that a better reconstruction is worth more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nla_megatron import geometry
from nla_megatron.config.schema import RewardConfig
from nla_megatron.errors import ConfigError, RewardError
from nla_megatron.rewards import make_reward
from nla_megatron.rewards.composition import Composed
from tests.support.measured import measured

TRANSFORMS = ["negative", "log", "exp", "bounded"]


def reconstruction(**options: Any) -> Composed:
    return make_reward(RewardConfig({"reconstruction": {"options": options}}))


def rewards(mse: Sequence[float], failed: Sequence[bool] | None = None, **options: Any) -> list[float]:
    answers = [None if bad else "a" for bad in failed or [False] * len(mse)]
    return reconstruction(**options)(measured(answers, mse=mse), 0).rewards.tolist()


@pytest.mark.parametrize(
    ("transform", "temperature", "by_hand"),
    [
        ("negative", 1.0, [-0.5, -1.5]),
        ("log", 1.0, [math.log(2), -math.log(1.5)]),
        ("exp", 1.0, [math.exp(-0.5), math.exp(-1.5)]),
        ("exp", 3.0, [math.exp(-1.5), math.exp(-4.5)]),
        ("bounded", 1.0, [1 / 1.5, 1 / 2.5]),
    ],
)
def test_each_transform_by_hand(transform: str, temperature: float, by_hand: list[float]) -> None:
    assert rewards([0.5, 1.5], transform=transform, temperature=temperature) == pytest.approx(by_hand)


@pytest.mark.parametrize(
    ("transform", "worth"), [("negative", -2.0), ("log", -math.log(2)), ("exp", math.exp(-2)), ("bounded", 1 / 3)]
)
def test_a_failed_response_is_worth_an_orthogonal_reconstruction(transform: str, worth: float) -> None:
    """Whatever error stands beside it, and without touching the others."""
    found = rewards([0.1, 0.1, float("nan")], [False, True, True], transform=transform)
    assert found[1:] == pytest.approx([worth, worth])
    assert found[0] == rewards([0.1], transform=transform)[0]
    assert found[0] > worth


@pytest.mark.parametrize("transform", TRANSFORMS)
@given(st.floats(0.001, 3.9), st.floats(0.001, 3.9))
def test_a_better_reconstruction_is_never_worth_less(transform: str, a: float, b: float) -> None:
    better, worse = rewards([min(a, b), max(a, b)], transform=transform)
    assert better >= worse
    assert better > worse or abs(a - b) < 1e-5


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_reward_of_vectors_grows_as_they_turn_towards_the_target(transform: str) -> None:
    target = torch.tensor([[1.0, 0.0]]).expand(4, 2)
    angles = torch.tensor([math.pi, 1.5, 0.7, 0.1])
    predicted = torch.stack([angles.cos(), angles.sin()], dim=1)
    found = rewards(geometry.row_mse(predicted, target).tolist(), transform=transform)
    assert found == sorted(found) and len(set(found)) == 4


def test_a_sum_over_dimensions_is_d_times_the_mean() -> None:
    """Also of a response without an explanation: an orthogonal prediction is off by 2 in the mean, 2·D in the sum."""
    given_ = measured(["a", None], mse=[0.25, 0.0], d_model=[8, 8])
    found = reconstruction(mse_reduction="sum")(given_, 0).rewards
    assert found.tolist() == [-2.0, -16.0]
    bounded = reconstruction(mse_reduction="sum", transform="bounded")(given_, 0).rewards
    assert bounded.tolist() == pytest.approx([1 / 3, 1 / 17])


def test_a_sum_needs_the_width_of_the_activations() -> None:
    with pytest.raises(RewardError, match="reads 'd_model'"):
        reconstruction(mse_reduction="sum")(measured(["a"], mse=[1]), 0)


def test_scale_comes_before_the_clipping() -> None:
    assert rewards([0.25, 1.0, 0.0], scale=4.0, clip_low=-2.0, clip_high=-0.5) == [-1.0, -2.0, -0.5]
    assert rewards([0.25, 1.0], clip_high=-0.5) == [-0.5, -1.0]
    assert rewards([0.25, 1.0], clip_low=-0.5) == [-0.25, -0.5]


def test_batch_normalisation_gives_mean_0_and_deviation_1() -> None:
    """Of -1, -2, -3: mean -2, standard deviation sqrt(2/3)."""
    unit = math.sqrt(1.5)
    assert rewards([1.0, 2.0, 3.0], batch_normalise=True) == pytest.approx([unit, 0.0, -unit])
    assert rewards([1.0, 1.0], batch_normalise=True) == [0.0, 0.0]
    assert rewards([1.0, 5.0], [False, True], batch_normalise=True) == pytest.approx([1.0, -1.0])


def test_the_moving_average_is_taken_off_before_it_moves() -> None:
    """Means -1, -2, -0.5 with beta 0.75: averages -1; then 0.75·-1 + 0.25·-2 = -1.25, taken off the third step."""
    reward = reconstruction(ema_beta=0.75)
    found = [reward(measured(["a", "b"], mse=mse), 0).rewards.tolist() for mse in ([0.5, 1.5], [1.0, 3.0], [0.5, 0.5])]
    assert found == [[0.5, -0.5], [0.0, -2.0], [0.75, 0.75]]
    assert reward.state() == {"reconstruction/average": 0.75 * -1.25 + 0.25 * -0.5}


def test_only_what_a_step_learns_from_moves_the_average_once() -> None:
    """Of -1 and -3 the average is -2; a greedy response and a prompt that was thrown away are beside it, not in it."""
    reward, seen = reconstruction(ema_beta=0.5), measured(["a", "b"], mse=[1.0, 3.0])
    kept, others = reward.look(seen), reward.look(measured(["c", "d"], mse=[0.5, 4.0]))
    for _ in range(2):
        assert reward.scores(kept, seen, 0).rewards.tolist() == [1.0, -1.0]
        assert reward.scores(others, seen, 0, among=kept).rewards.tolist() == [1.5, -2.0]
    assert reward.state() == {}
    reward.settle(kept)
    assert reward.state() == {"reconstruction/average": -2.0}
    reward.settle(others)
    assert reward.state() == {"reconstruction/average": 0.5 * -2.0 + 0.5 * -2.25}


def test_others_are_normalised_by_what_a_step_learns_from() -> None:
    """Of -1 and -3: mean -2, deviation 1."""
    reward, seen = reconstruction(batch_normalise=True), measured(["a", "b"], mse=[1.0, 3.0])
    kept, others = reward.look(seen), reward.look(measured(["c", "d"], mse=[0.0, 4.0]))
    assert reward.scores(others, seen, 0, among=kept).rewards.tolist() == [2.0, -2.0]


def test_a_loaded_average_goes_on_where_it_was() -> None:
    first, second = reconstruction(ema_beta=0.5), reconstruction(ema_beta=0.5)
    assert first.state() == {}
    first(measured(["a"], mse=[1.0]), 0)
    second.load_state(first.state())
    step = measured(["a"], mse=[0.25])
    assert first(step, 1).rewards.tolist() == second(step, 1).rewards.tolist() == [0.75]
    assert reconstruction(ema_beta=0.5)(step, 1).rewards.tolist() == [0.0]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"transform": "square"}, "transform='square'"),
        ({"mse_reduction": "max"}, "mse_reduction='max'"),
        ({"ema_beta": 1.0}, "ema_beta=1.0"),
        ({"ema_beta": 0.9, "batch_normalise": True}, "batch_normalise with ema_beta"),
        ({"clip_low": 1.0, "clip_high": 0.0}, "clip_low=1.0 with clip_high=0.0"),
        ({"scale": float("nan")}, "scale=nan"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError, match=rf"reward\.terms\.reconstruction\.options: {found}"):
        reconstruction(**options)
