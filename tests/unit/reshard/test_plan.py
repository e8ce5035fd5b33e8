"""Plans over random layouts, carried out: exact, disjoint, not a byte more than needed, within the staging bound."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nla_megatron.errors import OverlappingClaims, UnheldRegion
from nla_megatron.reshard.carriers import ITEMSIZE, Claim, Group, Need, Sampler
from nla_megatron.reshard.copies import Copy, fused
from nla_megatron.reshard.plan import check_claims, compile_plan, world_bytes
from nla_megatron.reshard.regions import Piece, Region, contiguous, whole
from tests.support.reshard import Buffers, carry_out, elements, layouts

Layout = tuple[int, dict[str, tuple[int, ...]], list[Claim], list[Sampler]]


def held_by(rank: int, tensors: dict[str, np.ndarray], claims: list[Claim]) -> Buffers:
    regions = {claim.piece.buffer: claim.piece.region for claim in claims if rank in claim.group.members}
    return {buffer: tensors[region.name][np.ix_(*region.axes)].copy() for buffer, region in regions.items()}


@given(layouts(), st.integers(8, 400))
def test_every_need_arrives_exactly_and_the_bytes_are_the_lower_bound(layout: Layout, staging: int) -> None:
    world, shapes, claims, samplers = layout
    check_claims(claims)
    start, tensors = 0, {}
    for name, shape in shapes.items():
        tensors[name] = np.arange(start, start + int(np.prod(shape))).reshape(shape)
        start += tensors[name].size
    plans = [compile_plan(claims, samplers, rank, "bfloat16", staging) for rank in range(world)]
    wanted: list[Buffers] = [{} for _ in range(world)]
    bound = 0
    for sampler in samplers:
        for rank in sampler.ranks:
            held = {one for claim in claims if rank in claim.group.members for one in elements(claim.piece.region)}
            for need in sampler.needs:
                wanted[rank][need.piece.buffer] = np.full(need.piece.region.shape, -1)
                bound += 2 * len(elements(need.piece.region) - held)
    carry_out(plans, [held_by(rank, tensors, claims) for rank in range(world)], wanted)
    for sampler in samplers:
        for rank in sampler.ranks:
            for need in sampler.needs:
                region = need.piece.region
                assert (wanted[rank][need.piece.buffer] == tensors[region.name][np.ix_(*region.axes)]).all()
    assert sum(plan.bytes_sent for plan in plans) == sum(plan.bytes_received for plan in plans) == bound
    assert sum(plan.bytes_bound for plan in plans) == bound
    needed, here = world_bytes(claims, samplers, "bfloat16")
    assert needed - here == bound
    # One element fits a bucket however small the bound is.
    assert all(plan.staging <= max(staging, 2 * (len(samplers) + 1)) for plan in plans)
    for bucket in (bucket for plan in plans for bucket in plan.buckets):
        ways = [(peer, message.tag) for message in bucket.receives for peer in message.peers]
        assert len(set(ways)) == len(ways), "two messages that a transport could take for each other"


def shards(name: str, rows: int, groups: list[Group]) -> list[Claim]:
    """A matrix of `rows` x 4, its rows shared out evenly over the groups."""
    each = rows // len(groups)
    regions = [Region(name, (range(each * at, each * (at + 1)), range(4))) for at in range(len(groups))]
    return [Claim(Piece(one, name, 0, (4, 1)), group) for one, group in zip(regions, groups, strict=True)]


def needs(name: str, rows: range) -> Need:
    return Need(Piece(Region(name, (rows, range(4))), f"to {name}", 0, (4, 1)), "float32")


def test_replicas_share_the_sending() -> None:
    # Four replicas hold everything, two other ranks need everything: each replica sends half of it once.
    group = Group(0, (0, 1, 2, 3))
    claims = [claim for number in range(8) for claim in shards(f"w{number}", 6, [group])]
    sampler = Sampler((4, 5), tuple(needs(f"w{number}", range(6)) for number in range(8)))
    plans = [compile_plan(claims, [sampler], rank, "float32", 1 << 20) for rank in range(6)]
    sent = [plan.bytes_sent for plan in plans]
    assert sent == [8 * 6 * 4 * 4 // 2] * 4 + [0, 0]
    assert Counter(m.peers for plan in plans for b in plan.buckets for m in b.sends) == {(4,): 2, (5,): 2}


def test_what_goes_to_several_ranks_is_packed_once_and_travels_in_one_message_each() -> None:
    group = Group(0, (0,))
    claims = [claim for number in range(5) for claim in shards(f"w{number}", 6, [group])]
    sampler = Sampler((0, 1, 2, 3), tuple(needs(f"w{number}", range(6)) for number in range(5)))
    plan = compile_plan(claims, [sampler], 0, "float32", 1 << 20)
    [message] = plan.buckets[0].sends
    assert message.peers == (1, 2, 3) and message.size == 5 * 24
    assert plan.bytes_sent == 3 * 4 * 5 * 24 and plan.staging == 4 * 5 * 24


def test_equal_layouts_send_nothing() -> None:
    groups = [Group(0, (0, 2)), Group(1, (1, 3))]
    samplers = [Sampler((0, 2), (needs("w", range(4)),)), Sampler((1, 3), (needs("w", range(4, 8)),))]
    for rank in range(4):
        plan = compile_plan(shards("w", 8, groups), samplers, rank, "float32", 1 << 20)
        assert (plan.bytes_sent, plan.bytes_received, plan.messages) == (0, 0, 0)
        assert plan.bytes_local == 4 * 4 * ITEMSIZE["float32"]


def test_trainer_and_sampler_may_share_no_rank() -> None:
    groups = [Group(0, (0,)), Group(1, (1,))]
    sampler = Sampler((2, 3), (needs("w", range(8)),))
    plans = [compile_plan(shards("w", 8, groups), [sampler], rank, "float32", 1 << 20) for rank in range(4)]
    assert [plan.bytes_needed for plan in plans] == [0, 0, 128, 128]
    assert [plan.bytes_sent for plan in plans] == [128, 128, 0, 0]


def test_the_wire_carries_the_narrower_dtype() -> None:
    claims, sampler = shards("w", 4, [Group(0, (0,))]), Sampler((1,), (needs("w", range(4)),))
    assert compile_plan(claims, [sampler], 1, "bfloat16", 1 << 20).bytes_received == 2 * 16
    assert compile_plan(claims, [sampler], 1, "float32", 1 << 20).bytes_received == 4 * 16


def test_a_region_nobody_holds_and_claims_that_overlap_are_named() -> None:
    claims, sampler = shards("w", 8, [Group(0, (0,)), Group(1, (1,))]), Sampler((0,), (needs("w", range(8)),))
    with pytest.raises(UnheldRegion, match=r"w\[4:8, 0:4\] is held by no rank"):
        compile_plan(claims[:1], [sampler], 0, "float32", 1 << 20)
    twice = Claim(Piece(Region("w", (range(3, 5), range(4))), "again", 0, (4, 1)), Group(2, (0,)))
    with pytest.raises(OverlappingClaims, match="w"):
        check_claims([*claims, twice])
    check_claims(claims)


def test_runs_of_equal_copies_become_one() -> None:
    def copy(source: int, target: int, buffer: str = "a") -> Copy:
        return Copy((2, 3), buffer, source, (3, 1), "b", target, (5, 1))

    run = [copy(10 * number, 7 * number) for number in range(4)]
    assert fused(run) == [Copy((4, 2, 3), "a", 0, (10, 3, 1), "b", 0, (7, 5, 1))]
    assert fused([*run, copy(99, 28)]) == [*fused(run), copy(99, 28)]
    assert fused([copy(0, 0), copy(0, 7, "other")]) == [copy(0, 0), copy(0, 7, "other")]


def test_a_whole_tensor_is_cut_into_buckets() -> None:
    claims = [Claim(Piece(whole("w", (100, 4)), "w", 0, contiguous((100, 4))), Group(0, (0,)))]
    sampler = Sampler((1,), (needs("w", range(100)),))
    plan = compile_plan(claims, [sampler], 1, "float32", 320)
    assert len(plan.buckets) == 10 and plan.staging == 160
    # What is held in bf16 travels so, whatever it is needed in: twice as much fits.
    assert len(compile_plan(claims, [sampler], 1, "bfloat16", 320).buckets) == 5
