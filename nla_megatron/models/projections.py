"""What a model learns for the mode `project`: a chunk holds the projections of the interventions at its own blocks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

from nla_megatron.interventions.projection import Projection
from nla_megatron.interventions.spec import Intervention
from nla_megatron.models.builder import chunks_of
from nla_megatron.parallel.world import World

PROJECTIONS = "projections"
"""Under this name a chunk holds them, by the intervention's number."""


def projection_of(each: Intervention, hidden_size: int, seed: int | None) -> Projection:
    """That of an intervention as it starts; `seed` as in `Projection`."""
    return Projection(each.vector_width or hidden_size, hidden_size, each.projection_layers, seed)


def projections_of(model: Any) -> dict[int, Projection]:
    """What this rank's chunks learn for `project`, by the intervention's number."""
    held: list[nn.ModuleDict] = [getattr(chunk, PROJECTIONS, nn.ModuleDict()) for chunk in chunks_of(model)]
    return {int(number): module for each in held for number, module in each.items() if isinstance(module, Projection)}


@torch.no_grad()
def whole_projections(model: Any, world: World) -> dict[int, Projection]:
    """Copies of all that a model learns for `project`, by number, on every rank, whichever stage has it; collective."""
    chunk, mine = chunks_of(model)[0], projections_of(model)
    wanted = () if chunk.sites is None else chunk.sites.interventions
    whole = {}
    for number, each in enumerate(wanted):
        if each.mode != "project":
            continue
        copy = projection_of(each, chunk.shape.hidden_size, None).to(world.device).requires_grad_(False).eval()
        for name, parameter in copy.named_parameters():
            # One stage has it, and the others add nothing.
            parameter.copy_(mine[number].get_parameter(name)) if number in mine else parameter.zero_()
            if world.pp > 1:
                dist.all_reduce(parameter, group=parallel_state.get_pipeline_model_parallel_group())
        whole[number] = copy
    return whole
