"""Sweeps in Hydra's grammar: what each form means, how points are named, and that names survive as values."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nla_megatron.config.compose import compose
from nla_megatron.config.multirun import Axis, axes_of, label_of, literal, points_of
from nla_megatron.config.typed import quoted
from nla_megatron.errors import ConfigError

REQUIRED = ["av=av", "ar=ar", "data=data"]


@pytest.mark.parametrize(
    ("typed", "values"),
    [
        ("seed=0,1,2", ("0", "1", "2")),
        ("seed=range(3)", ("0", "1", "2")),
        ("seed=range(1,7,2)", ("1", "3", "5")),
        ("seed=choice(4,2)", ("4", "2")),
        ("seed=sort(3,1,2)", ("1", "2", "3")),
        ("optim.lr=1e-4,3e-4", ("0.0001", "0.0003")),
        ("parallel.stages=[1,2],[2,1]", ("[1,2]", "[2,1]")),
        ("rollout=single,tp2", ("single", "tp2")),
        ("rollout=glob(*)", ("single", "tp2")),
    ],
)
def test_every_form_of_a_sweep(typed: str, values: tuple[str, ...]) -> None:
    fixed, axes = axes_of("rl", [typed, "steps=3"])
    assert (fixed, axes) == (["steps=3"], [Axis(typed.split("=")[0], values)])


def test_points_are_every_combination_the_last_key_fastest() -> None:
    _, axes = axes_of("rl", ["steps=1,2", "seed=5,6"])
    found = [(point["steps"], point["seed"]) for point in points_of(axes)]
    assert found == [("1", "5"), ("1", "6"), ("2", "5"), ("2", "6")]


def test_a_key_that_is_given_twice_counts_as_hydra_counts_it() -> None:
    fixed, axes = axes_of("rl", ["seed=0,1", "seed=7", "steps=2", "steps=3,4"])
    assert (fixed, axes) == (["seed=7"], [Axis("steps", ("3", "4"))])


@pytest.mark.parametrize(
    ("typed", "named"),
    [("seed=range(0)", "a sweep of zero jobs"), ("seed=interval(0,1)", "interval(0,1)"), ("seed=range(", "range(")],
)
def test_what_is_no_list_of_values_is_refused(typed: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        axes_of("rl", [typed])
    assert named in caught.value.found


@pytest.mark.parametrize(
    ("point", "label"),
    [
        ({"optim.lr": "0.0003", "seed": "1"}, "optim.lr=0.0003,seed=1"),
        ({"algorithm": "grpo"}, "algorithm=grpo"),
        ({"av": "/runs/a b/av", "+provider.options.n": "[1,2]"}, "av=runs-a-b-av,provider.options.n=1-2"),
        ({}, ""),
    ],
)
def test_labels_are_names_of_directories(point: dict[str, str], label: str) -> None:
    assert label_of(point) == label


def test_a_label_is_never_longer_than_a_name_may_be() -> None:
    assert len(label_of({f"key{number}": "x" * 40 for number in range(20)})) == 100


@given(st.text(st.sampled_from("ab '\"\\,=[]{}()/:é"), max_size=12).filter(lambda text: text.strip() == text))
def test_a_quoted_text_is_read_back_as_it_was(text: str) -> None:
    assert compose("rl", [*REQUIRED, f"out={quoted(text)}"]).out == text


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-1e3, 1e3).map(lambda number: number + 0.5)
    | st.text(st.sampled_from("ab '\"\\,=[]{}()/:é\n"), max_size=8),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(st.sampled_from("ab_ 1.:=,{"), max_size=5).map("k{}k".format), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(VALUES)
def test_a_literal_is_read_back_as_it_was(value: Any) -> None:
    assert compose("rl", [*REQUIRED, "out=x", f"+task.options.given={literal(value)}"]).task.options["given"] == value
