"""What a load refuses: weights that are no numbers, arrivals that are not what left, peers that are gone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from nla_megatron.errors import NotFinite, PeerLost, ReshardMismatch
from nla_megatron.reshard.carriers import Claim, Group, Need, Sampler
from nla_megatron.reshard.copies import Copy, fused
from nla_megatron.reshard.execute import Gate, carry_out, check_finite, do, peers_there
from nla_megatron.reshard.plan import compile_plan
from nla_megatron.reshard.regions import Piece, Region
from tests.support.reshard import do as do_in_numpy
from tests.support.worlds import world_of

ROWS = (range(0, 6, 2), range(1, 6, 2))


class Kept:
    """Parameters of a sampler; what arrives in `damaged` is changed before anybody looks."""

    def __init__(self, gate: Gate, damaged: str = ""):
        self.buffers, self.gate, self.damaged = {name: torch.zeros(3, 4) for name in "ab"}, gate, damaged
        self.finished: list[str] = []

    def tensor(self, name: str) -> Tensor:
        return self.buffers[name]

    def finish(self, name: str) -> None:
        self.finished.append(name)
        if name == self.damaged:
            self.buffers[name][1].copy_(self.buffers[name][1].flip(0))
        self.gate.arrived(name, self.buffers[name])


def load(damaged: str = "", staging: int = 1 << 10, made: tuple[str, ...] = ()) -> tuple[Tensor, Kept, int]:
    """A 6 x 4 matrix into two parameters, its even and its odd rows, on one rank; the bytes held for it at most."""
    world, group = world_of(), Group(0, (0,))
    whole = Region("w", (range(6), range(4)))
    claims = [Claim(Piece(whole, "w", 0, (4, 1)), group)]
    needs = [
        Need(Piece(Region("w", (rows, range(4))), name, 0, (4, 1)), "float32")
        for rows, name in zip(ROWS, "ab", strict=True)
    ]
    samplers = [Sampler((0,), tuple(needs))]
    sources = {"w": torch.arange(24.0).reshape(6, 4)}
    gate = Gate(claims, samplers, 0, 2, seed=1)
    gate.left(sources)
    into = Kept(gate, damaged)
    peak = carry_out(compile_plan(claims, samplers, 0, "float32", staging), sources, into, world.device, made)
    gate.compare(world)
    return sources["w"], into, peak


def test_a_plan_lands_where_it_should_and_passes_the_gate() -> None:
    source, into, _ = load()
    assert torch.equal(into.buffers["a"], source[::2]) and torch.equal(into.buffers["b"], source[1::2])


def test_a_parameter_that_takes_several_buckets_is_finished_once_when_all_of_it_is_there() -> None:
    # 32 bytes for two messages: a row at a time, six buckets; the gate is asked at the end of each parameter.
    _, into, _ = load(staging=32)
    assert into.finished == ["a", "b"]


def test_what_is_made_for_a_load_counts_as_held_for_it() -> None:
    assert load()[2] == 0
    assert load(made=("w",))[2] == 6 * 4 * 4


def test_weights_that_arrive_in_another_order_stop_the_run() -> None:
    with pytest.raises(ReshardMismatch, match=r"w\[1:6:2, 0:4\]"):
        load(damaged="b")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number_is_named_before_anything_moves(value: float) -> None:
    weights = {"fine": torch.ones(5), "broken": torch.tensor([1.0, value])}
    with pytest.raises(NotFinite, match="broken on rank 0"):
        check_finite(weights, world_of())


def test_large_weights_are_numbers() -> None:
    check_finite({"large": torch.full((100,), 3e38)}, world_of())


@example([0, 10, 20], [5, 4, 3])
@example([20, 10, 0], [0, 1, 2])
@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.permutations(range(6)))
def test_fused_copies_do_what_they_did_one_by_one(sources: list[int], places: list[int]) -> None:
    # Loaders may go through a buffer forwards or backwards, evenly or not.
    copies = [
        Copy((2, 3), "a", source, (4, 1), "b", 8 * place, (4, 1))
        for source, place in zip(sources, places, strict=False)
    ]  # fmt: skip
    buffer, expected, found = torch.arange(60.0), np.zeros(48, np.float32), torch.zeros(48)
    for copy in copies:
        do_in_numpy(copy, {"a": buffer.numpy()}, {"b": expected})
    for copy in fused(copies):
        do(copy, buffer, found)
    assert found.tolist() == expected.tolist()


def test_a_transport_that_breaks_is_a_peer_that_is_gone() -> None:
    with pytest.raises(PeerLost, match=r"in the middle of a load \(Connection closed"), peers_there():
        raise RuntimeError("Connection closed by peer\nand a trace")
