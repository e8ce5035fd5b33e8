"""Small collectives over the whole world. Heavy tensors never pass here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from nla_megatron.parallel.world import World

T = TypeVar("T")


def sum_over_world(values: torch.Tensor, world: World) -> torch.Tensor:
    """Element-wise sum on every rank; callers that do not speak for their rows pass zeros."""
    total = values.detach().to("cpu", copy=True)
    if world.size > 1:
        dist.all_reduce(total, group=world.control)
    return total


def max_over_world(value: float, world: World) -> float:
    most = torch.tensor(value, dtype=torch.float64)
    if world.size > 1:
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=world.control)
    return float(most)


def sum_statistics(stats: Mapping[str, torch.Tensor | float], names: tuple[str, ...], world: World) -> dict[str, float]:
    """Named scalars summed over the world in one collective; `names` is the same on every rank, absent ones are 0."""
    packed = torch.tensor([float(stats.get(name, 0.0)) for name in names], dtype=torch.float64)
    return dict(zip(names, sum_over_world(packed, world).tolist(), strict=True))


def gather_objects(value: T, world: World) -> list[T]:
    """Everybody's value, by rank."""
    if world.size == 1:
        return [value]
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, value, group=world.control)
    return everyone


def broadcast_object(value: T | None, world: World, source: int = 0) -> T:
    box: list[Any] = [value]
    if world.size > 1:
        dist.broadcast_object_list(box, group_src=source, group=world.control)
    return box[0]


def by_rank_0(compute: Callable[[], T], world: World) -> T:
    """What rank 0 computes, on every rank: another program that is asked may answer each rank differently."""
    return broadcast_object(compute() if world.is_main else None, world)


def barrier(world: World) -> None:
    if world.size > 1:
        dist.barrier(group=world.control)
