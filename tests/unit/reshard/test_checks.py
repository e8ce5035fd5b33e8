"""What is refused before there is a plan."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nla_megatron.errors import ConfigError, LayoutError, ModelsDiffer, UnheldRegion
from nla_megatron.reshard.carriers import Claim, Group
from nla_megatron.reshard.checks import check_held, check_places, check_same_model
from nla_megatron.reshard.megatron_side import TrainLayout
from nla_megatron.reshard.regions import Piece, whole
from tests.support.families import family_shape
from tests.support.worlds import world_of


@pytest.mark.parametrize(
    ("field", "value"),
    [("family", "LlamaForCausalLM"), ("vocab_size", 1001), ("hidden_size", 96), ("num_layers", 4), ("rope_theta", 5.0)],
)
def test_models_that_differ_are_named_with_both_values(field: str, value: object) -> None:
    shape = family_shape("qwen3")
    check_same_model(shape, shape)
    with pytest.raises(ModelsDiffer, match=f"{field}={value!r} in the sampler's") as refused:
        check_same_model(shape, replace(shape, **{field: value}))
    assert refused.value.expected.startswith(f"{field}={getattr(shape, field)!r}")


@pytest.mark.parametrize(
    ("layout", "samplers", "engines", "message"),
    [
        (TrainLayout(tp=2), range(4), (1, 1, 1), "engines on ranks [0, 1, 2]"),
        (TrainLayout(tp=2), range(2, 4), (2, 2, 2, 2), "engines on ranks [0, 1, 2, 3]"),
        (TrainLayout(tp=2), range(2), (0, 0), "engines on ranks []"),
        (TrainLayout(), range(3), (2, 2, 2), "3 ranks that sample with rollout.tp of [2]"),
        (TrainLayout(), range(3), (1, 2, 2), "rollout.tp of [1, 2]"),
        (TrainLayout(tp=2, pp=2), range(2), (1, 1), "a trainer on ranks 0 to 3"),
        (TrainLayout(tp=2, first=1), range(2), (1, 1), "a trainer on ranks 1 to 2"),
        (TrainLayout(first=-1), range(2), (1, 1), "a trainer on ranks -1 to -1"),
    ],
)
def test_trainers_and_samplers_that_lie_elsewhere_than_they_say_are_refused(
    layout: TrainLayout, samplers: range, engines: tuple[int, ...], message: str
) -> None:
    with pytest.raises(LayoutError, match=re.escape(message)):
        check_places(layout, samplers, engines)


def test_the_samplers_may_be_any_ranks_in_whole_replicas() -> None:
    assert check_places(TrainLayout(tp=2), range(2, 6), (0, 0, 2, 2, 2, 2)) == 2
    assert check_places(TrainLayout(tp=2, first=1), range(3), (1, 1, 1)) == 1


class Held:
    """What a trainer's rank holds, as `Sources`."""

    def __init__(self, **parameters: Tensor):
        self.parameters = parameters


def claims(**shapes: tuple[int, ...]) -> list[Claim]:
    group = Group(0, (0,))
    return [Claim(Piece(whole(name, shape), name, 0, (shape[1], 1)), group) for name, shape in shapes.items()]


def test_a_parameter_that_is_claimed_and_not_there_is_named() -> None:
    held: Any = Held(a=torch.zeros(3, 4), b=torch.zeros(2, 2))
    with pytest.raises(UnheldRegion, match="rank 0 lacks c"):
        check_held(held, claims(a=(3, 4), c=(2, 2)), world_of())
    with pytest.raises(UnheldRegion, match="rank 0 lacks b"):
        check_held(held, claims(a=(3, 4), b=(2, 3)), world_of())


def test_only_what_is_handed_over_has_to_be_of_one_dtype() -> None:
    held: Any = Held(a=torch.zeros(3, 4).bfloat16(), b=torch.zeros(2, 2), beside=torch.zeros(5))
    assert check_held(held, claims(a=(3, 4)), world_of()) == "bfloat16"
    with pytest.raises(ConfigError, match="parameters of bfloat16 and float32"):
        check_held(held, claims(a=(3, 4), b=(2, 2)), world_of())
    masters = [one._replace(dtype="float32") for one in claims(b=(2, 2))]
    assert check_held(held, [*claims(a=(3, 4)), *masters], world_of()) == "bfloat16"
