"""Whether two forms of a model are the same: every tensor by its checksum, then what both compute on a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nla_megatron.conversion.description import WEIGHTS, is_checkpoint, located
from nla_megatron.conversion.manifest import dtype_name, read_manifest
from nla_megatron.conversion.safetensors_file import TensorSpec, checksum
from nla_megatron.conversion.source import HuggingFaceSide, MegatronSide
from nla_megatron.errors import MissingFile
from nla_megatron.parallel.collectives import broadcast_object, gather_objects
from nla_megatron.parallel.world import World

Side = HuggingFaceSide | MegatronSide


@dataclass(frozen=True)
class Difference:
    """One line of the table: a tensor, what each side has of it, and how they differ."""

    tensor: str
    hf: str
    checkpoint: str
    what: str


def sides(hf: str, checkpoint: str, world: World) -> tuple[HuggingFaceSide, Side]:
    """Both forms of the model; collective. A whole model is compared with an AR as far as the AR goes.

    Raises:
        MissingFile, CheckpointError, UnsupportedModel: as the sides do.
    """
    other: Side
    if is_torch_dist(checkpoint):
        own = has_own_config(Path(checkpoint))
        mine = MegatronSide(checkpoint, None if own else hf, world) if world.is_main else None
        plan = broadcast_object(mine.plan if mine else None, world)
        other = mine or MegatronSide(checkpoint, None if own else hf, world, plan)
    else:
        other = HuggingFaceSide(checkpoint)
    whole = HuggingFaceSide(hf)
    if other.model.is_ar and not whole.model.is_ar:
        return HuggingFaceSide(hf, other.model.shape.num_layers), other
    return whole, other


def is_torch_dist(directory: str) -> bool:
    return is_checkpoint(Path(directory)) or is_checkpoint(Path(directory) / WEIGHTS)


def has_own_config(checkpoint: Path) -> bool:
    try:
        located(checkpoint, None)
    except MissingFile:
        return False
    return True


def compare_weights(one: HuggingFaceSide, other: Side, world: World) -> tuple[int, list[Difference]]:
    """How many tensors were compared, and those that differ; each rank reads its share, all get the whole list."""
    left, right = one.specs(), other.specs()
    names = list(dict.fromkeys([*left, *right]))
    told = _recorded(one), _recorded(other)
    mine = []
    for name in names[world.rank :: world.size]:
        if name not in left or name not in right:
            there = left.get(name) or right[name]
            hf, checkpoint = ("-", _described(there)) if name not in left else (_described(there), "-")
            mine.append(Difference(name, hf, checkpoint, "only on one side"))
        elif left[name].shape != right[name].shape:
            mine.append(Difference(name, _described(left[name]), _described(right[name]), "another shape"))
        else:
            mine += _compare(name, one, other, (left[name], right[name]), told)
    return len(names), [difference for part in gather_objects(mine, world) for difference in part]


def _compare(
    name: str, one: HuggingFaceSide, other: Side, specs: tuple[TensorSpec, TensorSpec],
    recorded: tuple[Mapping[str, str], Mapping[str, str]],
) -> list[Difference]:  # fmt: skip
    tensors = [one.read(name), other.read(name)]
    sums = [checksum(tensor) for tensor in tensors]
    hf, there = (f"{dtype_name(spec.dtype)} {told[:8]}" for spec, told in zip(specs, sums, strict=True))
    found = [
        Difference(name, hf, there, f"{side} has changed since its conversion.json: {before[name][:8]}")
        for side, before, now in zip(("hf", "checkpoint"), recorded, sums, strict=True)
        if name in before and before[name] != now
    ]
    if sums[0] != sums[1] and (what := _difference(*tensors)):
        found.append(Difference(name, hf, there, what))
    return found


def _difference(one: Tensor, other: Tensor) -> str:
    """How two tensors of one shape differ; "" where one is the other, rounded to its dtype."""
    if one.dtype != other.dtype:
        coarse = one.dtype if one.dtype.itemsize < other.dtype.itemsize else other.dtype
        if torch.equal(one.to(coarse), other.to(coarse)):
            return ""
    apart = 0.0
    # In pieces, so that no fp32 copy of a large tensor is made.
    for a, b in zip(one.reshape(-1).split(1 << 24), other.reshape(-1).split(1 << 24), strict=True):
        apart = max(apart, float((a.float() - b.float()).abs().max()))
    return f"{apart:.3g} apart at most" if apart else "the same values in other bits"


def _described(spec: TensorSpec) -> str:
    return f"{dtype_name(spec.dtype)} {'x'.join(map(str, spec.shape))}"


def _recorded(side: Side) -> dict[str, str]:
    """The checksums that a conversion noted for this side."""
    directory = side.directory if isinstance(side, HuggingFaceSide) else side.companions
    manifest: dict[str, Any] = read_manifest(directory) or {"tensors": {}}
    if isinstance(side, MegatronSide) and side.reader.directory.parent != directory:
        return {}
    return {name: entry["checksum"] for name, entry in manifest["tensors"].items()}


def table(differences: list[Difference]) -> str:
    rows = [("tensor", "hf", "checkpoint", "difference")]
    rows += [(one.tensor, one.hf, one.checkpoint, one.what) for one in differences]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    padded = ([*(row[column].ljust(widths[column]) for column in range(3)), row[3]] for row in rows)
    return "\n".join("  ".join(row) for row in padded)
