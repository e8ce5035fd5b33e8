"""What is checked before there is a plan: the same model, on the ranks that were named, and all of it there."""

from __future__ import annotations

from collections.abc import Sequence

from nla_megatron.errors import ConfigError, LayoutError, ModelsDiffer, UnheldRegion
from nla_megatron.parallel.collectives import gather_objects
from nla_megatron.parallel.world import World
from nla_megatron.reshard.carriers import Claim
from nla_megatron.reshard.megatron_side import Sources, TrainLayout
from nla_megatron.types import ModelShape


def check_same_model(trainer: ModelShape, sampler: ModelShape) -> None:
    """Raises ModelsDiffer with the first field in which two shapes differ."""
    for name, value in vars(trainer).items():
        if getattr(sampler, name) != value:
            raise ModelsDiffer(
                f"{name}={getattr(sampler, name)!r} in the sampler's model", f"{name}={value!r}, as the trainer's",
                "give the engine the directory that the trainer started from",
            )  # fmt: skip


def check_places(layout: TrainLayout, samplers: range, engines: Sequence[int]) -> int:
    """The tensor-parallel size of the engines, where trainer and sampler lie on a world as they say.

    Args:
        engines: of each rank of the world the tensor-parallel size of its engine, 0 where there is none.

    Raises:
        LayoutError: ranks that are not there, engines on other ranks than `samplers`, or replicas that do not fit them.
    """
    if layout.first < 0 or layout.ranks.stop > len(engines):
        raise LayoutError(
            f"a trainer on ranks {layout.first} to {layout.ranks.stop - 1}", f"ranks of a world of {len(engines)}",
            "change layout=",
        )  # fmt: skip
    sampling = [rank for rank, tp in enumerate(engines) if tp]
    if not sampling or sampling != list(samplers):
        raise LayoutError(
            f"engines on ranks {sampling}", f"on each of {list(samplers)}, and on no other",
            "give llm= on the ranks that sample, and name them in samplers=",
        )  # fmt: skip
    sizes = {engines[rank] for rank in sampling}
    if len(sizes) > 1 or len(sampling) % min(sizes):
        raise LayoutError(
            f"{len(sampling)} ranks that sample with rollout.tp of {sorted(sizes)}", "whole replicas of one size",
            "change rollout.tp or samplers=",
        )  # fmt: skip
    return sizes.pop()


def check_held(sources: Sources, claims: Sequence[Claim], world: World) -> str:
    """Collective: the dtype of what the ranks hold of their claims, where those do not say.

    Raises:
        UnheldRegion: a rank lacks a parameter that its place in the layout holds, or has a smaller one.
        ConfigError: parameters of several dtypes.
    """
    absent, dtypes = None, set()
    for claim in claims:
        if world.rank in claim.group.members:
            piece, parameter = claim.piece, sources.parameters.get(claim.piece.buffer)
            if parameter is None or piece.last >= parameter.numel():
                absent = absent or piece.buffer
            elif claim.dtype is None:
                dtypes.add(str(parameter.dtype).removeprefix("torch."))
    everyone = gather_objects((absent, dtypes), world)
    for rank, (name, _) in enumerate(everyone):
        if name is not None:
            raise UnheldRegion(
                f"rank {rank} lacks {name}, or has a smaller one", "the parameters that its place in the layout holds",
                "give the trainer's model on each of its ranks, and the layout in which it lies",
            )  # fmt: skip
    found = set[str]().union(*(dtypes for _, dtypes in everyone))
    if len(found) > 1:
        raise ConfigError(f"parameters of {' and '.join(sorted(found))}", "one dtype", "build the model in one")
    return found.pop() if found else "float32"
