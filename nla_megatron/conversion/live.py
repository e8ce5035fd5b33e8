"""Between a live Megatron model, on any TP x PP layout, and Hugging Face tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from nla_megatron.conversion.families import rules_of
from nla_megatron.conversion.hf import SafetensorsReader, read_value_head
from nla_megatron.conversion.rules import Rule, by_name
from nla_megatron.errors import CheckpointError
from nla_megatron.models.reconstructor import Reconstructor, build_reconstructor
from nla_megatron.parallel.world import World
from nla_megatron.types import ModelShape

VALUE_HEAD = "value_head.weight"


def global_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by name, blocks numbered over the whole pipeline."""
    numbers = {str(local): block.layer_number - 1 for local, block in enumerate(model.decoder.layers)}
    return {
        re.sub(r"^decoder\.layers\.(\d+)\.", lambda match: f"decoder.layers.{numbers[match[1]]}.", name): parameter
        for name, parameter in model.named_parameters()
    }


@torch.no_grad()
def load_from_hf(model: torch.nn.Module, directory: str, shape: ModelShape, world: World, *, with_head: bool) -> None:
    """Fill a model from a Hugging Face directory; each rank reads only its own slices.

    With `with_head=False` (an AR) deeper blocks, the final norm and the output layer may be there and are not read.

    Raises:
        CheckpointError: a tensor is missing, of another shape, or (for a whole model) left over.
    """
    reader, rules = SafetensorsReader(directory), by_name(rules_of(shape, with_head))
    _check_tensors(reader, list(rules.values()), strict=with_head)
    for name, parameter in global_parameters(model).items():
        if name != VALUE_HEAD:
            parameter.copy_(rules[name].read(reader.read, world.tp_rank, world.tp))


def load_reconstructor(directory: str, shape: ModelShape, world: World, dtype: str) -> Reconstructor:
    """An AR on this layout: its own head from an AR's directory, the identity from a base model's.

    Args:
        shape: already truncated to the K+1 blocks; deeper ones in the directory are not read.
    """
    model = build_reconstructor(shape, world, dtype)
    load_from_hf(model, directory, shape, world, with_head=False)
    head = read_value_head(directory)
    if head is not None and model.value_head is not None:
        model.value_head.load_state_dict({"weight": head})
    return model


def _check_tensors(reader: SafetensorsReader, rules: list[Rule], strict: bool) -> None:
    expected = {part.hf: rule.hf_shape(part) for rule in rules for part in rule.parts}
    extra = sorted(reader.names() - set(expected) - {"lm_head.weight"}) if strict else []
    if extra:
        raise CheckpointError(
            f"{len(extra)} tensors that the model has no place for, first {extra[0]!r}",
            "exactly the tensors of its config.json", "check that config.json belongs to these weights",
        )  # fmt: skip
    for name, shape in expected.items():
        if reader.shape(name) != shape:
            raise CheckpointError(
                f"{name} of shape {reader.shape(name)}",
                f"shape {shape}",
                "check that config.json belongs to these weights",
            )


class Exporter:
    """Full HF tensors from a live model: gathered over TP, handed over the pipeline, one tensor at a time."""

    def __init__(self, model: torch.nn.Module, shape: ModelShape, world: World, *, with_head: bool):
        self.world = world
        self.parameters = global_parameters(model)
        self.rules = [rule for rule in rules_of(shape, with_head) if not rule.alias]
        self.stage_of = self._stages()

    def _stages(self) -> dict[str, int]:
        """Which pipeline stage owns each parameter; fixed for the model's life, so asked once."""
        stages: list[dict[str, int]] = [{}] * self.world.pp
        mine = dict.fromkeys(self.parameters, self.world.pp_rank)
        if self.world.pp > 1:
            dist.all_gather_object(stages, mine, group=parallel_state.get_pipeline_model_parallel_group())
        else:
            stages = [mine]
        owners: dict[str, int] = {}
        for stage in stages:
            for name, owner in stage.items():
                owners.setdefault(name, owner)
        return owners

    def tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """(HF name, full tensor) on every rank, in the table's order; all ranks must consume it alike."""
        for rule in self.rules:
            yield from self._tensors_of(rule, dtype)

    @torch.no_grad()
    def _tensors_of(self, rule: Rule, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
        owner = self.stage_of[rule.megatron]
        tensors: dict[str, Tensor] = {}
        if owner == self.world.pp_rank:
            tensors = rule.write(self._shards(rule))
            tensors = {name: tensor.to(dtype or tensor.dtype).contiguous() for name, tensor in tensors.items()}
        for part in rule.parts:
            yield part.hf, self._over_pipeline(tensors.get(part.hf), rule.hf_shape(part), owner, dtype)

    def _shards(self, rule: Rule) -> list[Tensor]:
        mine = self.parameters[rule.megatron].detach()
        if rule.tp_axis is None or self.world.tp == 1:
            return [mine]
        shards = [torch.empty_like(mine) for _ in range(self.world.tp)]
        dist.all_gather(shards, mine.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
        return shards

    def _over_pipeline(
        self, tensor: Tensor | None, shape: tuple[int, ...], owner: int, dtype: torch.dtype | None
    ) -> Tensor:
        if self.world.pp == 1:
            assert tensor is not None
            return tensor
        like = next(iter(self.parameters.values()))
        full = torch.empty(shape, dtype=dtype or like.dtype, device=like.device) if tensor is None else tensor
        group = parallel_state.get_pipeline_model_parallel_group()
        dist.broadcast(full, src=dist.get_global_rank(group, owner), group=group)
        return full
