"""fp32 masters as what the trainer holds: megatron-core's distributed optimizer shares them out over the replicas.

A rank's part of a parameter is a flat range of its elements, whatever the parameter's shape. Cut out of the regions of
the parameter, each part is a few regions again; who holds it is one rank (or those with the same range).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from nla_megatron.conversion.live import global_parameters
from nla_megatron.errors import ConfigError
from nla_megatron.reshard.carriers import Claim, Group
from nla_megatron.reshard.regions import Piece, between

MASTER = "master:"
"""What precedes a parameter's name as the buffer of this rank's part of its master, flat and fp32."""

Ranges = Mapping[str, tuple[int, int]]
"""(start, end) of a rank's part, in elements of the parameter, by the parameter's name."""


def ranges_on(model: Any, optimizer: Any) -> dict[str, tuple[int, int]]:
    """This rank's part of every parameter that has a master. Parameters that are fp32 themselves, or frozen, have none.

    Raises:
        ConfigError: the optimizer is not megatron-core's distributed one.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    if not all(hasattr(part, "model_param_gbuf_map") for part in parts):
        raise ConfigError(
            f"masters of {type(optimizer).__name__}", "megatron-core's distributed optimizer", "hand over parameters"
        )
    found = {}
    for name, parameter in global_parameters(model).items():
        for part in parts:
            if getattr(parameter, "main_param", None) is not None and parameter in part.model_param_gbuf_map:
                mine = part._get_model_param_range_map(parameter)["param"]
                found[name] = (mine.start, mine.end)
    return found


def masters_of(model: Any, names: Ranges) -> dict[str, Tensor]:
    """This rank's masters under the names of their claims."""
    parameters: dict[str, Any] = dict(global_parameters(model))
    return {MASTER + name: parameters[name].main_param.detach() for name in names}


def claims_of_masters(claims: Sequence[Claim], ranges: Sequence[Ranges]) -> list[Claim]:
    """Claims on masters in the place of those on parameters that have some; the others stay.

    Args:
        ranges: of each rank of the world.
    """
    groups = {claim.group.ranks: claim.group for claim in claims}
    numbers = 1 + max((group.number for group in groups.values()), default=-1)
    out: list[Claim] = []
    for claim in claims:
        name = claim.piece.buffer
        held = {rank: ranges[rank][name] for rank in claim.group.ranks if name in ranges[rank]}
        if not held:
            out.append(claim)
        for start, stop in pairwise(sorted({place for ends in held.values() for place in ends})):
            here = [ends for ends in held.values() if ends[0] <= start and stop <= ends[1]]
            if here:
                ranks = tuple(rank for rank, ends in held.items() if ends == here[0])
                group = groups.setdefault(ranks, Group(numbers + len(groups), ranks))
                out += [
                    Claim(Piece(part.region, MASTER + name, part.offset - here[0][0], part.strides), group, "float32")
                    for part in between(claim.piece, start, stop)
                ]
    return out
