"""Reshard plans carried out on numpy arrays in one process, and random layouts to make plans of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from nla_megatron.reshard.carriers import Claim, Group, Need, Plan, Sampler
from nla_megatron.reshard.copies import PACKED, Copy
from nla_megatron.reshard.regions import Piece, Region, contiguous, whole

Buffers = dict[str, np.ndarray]


def elements(region: Region) -> set[tuple[str, tuple[int, ...]]]:
    return {(region.name, index) for index in product(*region.axes)}


def view(buffer: np.ndarray, offset: int, shape: Sequence[int], strides: Sequence[int]) -> np.ndarray:
    flat = buffer.reshape(-1)[offset:]
    return np.lib.stride_tricks.as_strided(flat, shape, [stride * buffer.itemsize for stride in strides])


def do(copy: Copy, sources: Mapping[str, np.ndarray], targets: Mapping[str, np.ndarray]) -> None:
    target = view(targets[copy.target], copy.target_offset, copy.shape, copy.target_strides)
    target[...] = view(sources[copy.source], copy.source_offset, copy.shape, copy.source_strides)


def carry_out(plans: Sequence[Plan], held: Sequence[Buffers], wanted: Sequence[Buffers]) -> None:
    """All ranks' plans, bucket after bucket; a message that one side does not expect fails."""
    for plan in plans:
        for bucket in plan.buckets:
            for copy in bucket.local:
                do(copy, held[plan.rank], wanted[plan.rank])
    mail: dict[Any, list[np.ndarray]] = defaultdict(list)
    for plan in plans:
        for bucket in plan.buckets:
            for message in bucket.sends:
                packed = np.full(message.size, -1)
                for copy in message.copies:
                    do(copy, held[plan.rank], {PACKED: packed})
                for peer in message.peers:
                    mail[plan.rank, peer, message.tag].append(packed)
    for plan in plans:
        for bucket in plan.buckets:
            for message in bucket.receives:
                [sender] = message.peers
                packed = mail[sender, plan.rank, message.tag].pop(0)
                assert packed.size == message.size
                for copy in message.copies:
                    do(copy, {PACKED: packed}, wanted[plan.rank])
    assert not any(len(waiting) for waiting in mail.values()), "sent and not received"


def cut(draw: st.DrawFn, region: Region, depth: int) -> list[Region]:
    """Random disjoint parts that make up the region: halves, stripes, and parts of them."""
    axes = [axis for axis, one in enumerate(region.axes) if len(one) > 1]
    if depth == 0 or not axes or draw(st.booleans()):
        return [region]
    axis = draw(st.sampled_from(axes))
    span = region.axes[axis]
    at = draw(st.integers(1, len(span) - 1))
    parts = (span[::2], span[1::2]) if draw(st.booleans()) else (span[:at], span[at:])
    return [
        one
        for part in parts
        for one in cut(draw, Region(region.name, (*region.axes[:axis], part, *region.axes[axis + 1 :])), depth - 1)
    ]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, dict[str, tuple[int, ...]], list[Claim], list[Sampler]]:
    """(ranks, tensors, claims, samplers): any cuts on both sides, any replicas; some ranks may not sample at all."""
    world = draw(st.integers(1, 7))
    tensors = {f"t{number}": draw(st.sampled_from([(6,), (4, 6), (5, 3), (1, 7)])) for number in range(3)}
    groups: dict[tuple[int, ...], Group] = {}
    claims = []
    for name, shape in tensors.items():
        for number, region in enumerate(cut(draw, whole(name, shape), 2)):
            ranks = tuple(sorted(draw(st.sets(st.integers(0, world - 1), min_size=1))))
            group = groups.setdefault(ranks, Group(len(groups), ranks))
            claims.append(Claim(Piece(region, f"{name}.{number}", 0, contiguous(region.shape)), group))
    sampling = draw(st.lists(st.integers(0, 2), min_size=world, max_size=world))
    samplers = []
    for number in range(2):
        needs = []
        for name, shape in tensors.items():
            for part, region in enumerate(cut(draw, whole(name, shape), 2)):
                if draw(st.integers(0, 3)):
                    dtype = draw(st.sampled_from(["float32", "bfloat16"]))
                    needs.append(Need(Piece(region, f"{name}:{part}", 0, contiguous(region.shape)), dtype))
        ranks = tuple(rank for rank in range(world) if sampling[rank] == number)
        if ranks:
            samplers.append(Sampler(ranks, tuple(needs)))
    return world, tensors, claims, samplers


def loaded_by_vllm(config: Any, full: Mapping[str, Any], rank: int, tp: int, expert_parallel: bool) -> dict[str, Any]:
    """What vLLM's own loaders make of full tensors on one rank, before anything is repacked."""
    import torch

    from nla_megatron.reshard import vllm_side

    with vllm_side._as_rank(rank, tp, expert_parallel, config):
        model = vllm_side.skeleton(config, torch.device("cpu"))
        for parameter in model.parameters():
            parameter.data.zero_()
        model.load_weights(iter(full.items()))
    return dict(model.named_parameters())


def vllm_config_of(directory: Path) -> Any:
    """vLLM's configuration of a model of which there is only a config.json."""
    from nla_megatron.reshard.summary import vllm_config

    return vllm_config(directory, "float32")
