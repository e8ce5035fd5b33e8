"""Where each Megatron parameter lies in a `torch_dist` checkpoint: keys, global shapes and chunks, without a weight.

They come from megatron-core itself: the model is built on the meta device in a world of one, and says how it would be
saved. The format knows no parallel layout, so that is how it lies whoever saved it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from nla_megatron.models.reconstructor import build_reconstructor
from nla_megatron.models.verbalizer import build_verbalizer
from nla_megatron.parallel.cpu import megatron_device
from nla_megatron.parallel.world import World
from nla_megatron.types import ModelShape

# How megatron-core can be told to name blocks and experts; the first is what it does unasked.
_NAMINGS: tuple[dict[str, bool], ...] = ({}, {"non_homogeneous_layers": True}, {"singleton_local_shards": True})
NAMINGS = len(_NAMINGS)


def naming_metadata(naming: int) -> dict[str, Any]:
    """What `sharded_state_dict` is told for a naming; it writes into what it gets."""
    return dict(_NAMINGS[naming])


@dataclass(frozen=True)
class Chunk:
    """A contiguous run of a parameter, as a box of the checkpoint's tensor `key`.

    Args:
        global_shape: of the tensor; with leading axes for the block (and the expert) where these are stacked.
        offsets, sizes: the box.
        axes: how many axes the parameter itself has; the box is one thick along the others.
        start: the first element of the run in the parameter.
    """

    key: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    axes: int
    start: int

    @property
    def numel(self) -> int:
        return prod(self.sizes)

    @property
    def shape(self) -> tuple[int, ...]:
        """The run as the parameter sees it."""
        return self.sizes[len(self.sizes) - self.axes :]


@dataclass(frozen=True)
class CheckpointPlan:
    """The chunks of each parameter, by Megatron's global name, and the checkpoint's objects (empty extra states)."""

    parameters: Mapping[str, tuple[Chunk, ...]]
    objects: Mapping[str, bytes]
    naming: int = 0

    def keys(self) -> dict[str, tuple[int, ...]]:
        """The tensors of the checkpoint and their global shapes."""
        return {chunk.key: chunk.global_shape for chunks in self.parameters.values() for chunk in chunks}


def checkpoint_plan(shape: ModelShape, world: World, *, is_ar: bool, naming: int = 0) -> CheckpointPlan:
    """How megatron-core lays a model out in a checkpoint; the world's model-parallel groups have one rank each.

    Args:
        naming: 0 stacks blocks and experts; 1 and 2 are the ways in which they have keys of their own.
    """
    assert world.tp == world.pp == 1, "a plan is made where nothing is cut"
    meta = torch.device("meta")
    build: Any = build_reconstructor if is_ar else build_verbalizer
    with meta, megatron_device(), _Unfilled():
        model = build(shape, replace(world, device=meta), "float32")
        sharded = model.sharded_state_dict(metadata=naming_metadata(naming))
    parameters: dict[str, tuple[Chunk, ...]] = {}
    objects: dict[str, bytes] = {}
    serialized: dict[str, bytes] = {}
    for name, value in sharded.items():
        kind = type(value).__name__
        if kind == "ShardedObject":
            told = repr(value.data)
            # One object for all that are alike, so that a plan stays small.
            if told not in serialized:
                serialized[told] = _serialized(value.data)
            objects[value.unique_key] = serialized[told]
        elif kind == "ShardedTensorFactory":
            parameters[name] = tuple(_chunk(one) for one in value.build())
        else:
            parameters[name] = (_chunk(value),)
    return CheckpointPlan(parameters, objects, naming)


class _Unfilled(TorchFunctionMode):
    """Inside, parameters are not initialised: on the meta device that is much work for nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _chunk(sharded: Any) -> Chunk:
    assert sharded.data.is_contiguous(), f"{sharded.key} is no run of its parameter"
    axes = sharded.data.dim()
    sizes = (*(1 for _ in range(sharded.prepend_axis_num)), *sharded.local_shape)
    return Chunk(
        sharded.key, tuple(sharded.global_shape), tuple(sharded.global_offset), sizes, axes,
        sharded.data.storage_offset(),
    )  # fmt: skip


def _serialized(data: object) -> bytes:
    buffer = io.BytesIO()
    torch.save([data], buffer)
    return buffer.getvalue()
