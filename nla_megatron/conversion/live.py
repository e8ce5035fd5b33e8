"""Between a live Megatron model, on any layout, and Hugging Face tensors.

`model` is one chunk of blocks or the list of a rank's chunks (virtual pipeline stages).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from nla_megatron.contract.blocks import ReconstructorSpec
from nla_megatron.conversion.description import checked_weights
from nla_megatron.conversion.families import rules_of
from nla_megatron.conversion.heads import head_of, resolved_spec
from nla_megatron.conversion.hf import check_tied
from nla_megatron.conversion.rules import Rule, by_name
from nla_megatron.models.builder import chunks_of
from nla_megatron.models.critic import Critic, build_critic
from nla_megatron.models.lora import adapted, merged_local
from nla_megatron.models.lora_spec import LORA
from nla_megatron.models.projections import PROJECTIONS
from nla_megatron.models.quantized import NONE, QuantizedLinear, quantized_layers
from nla_megatron.models.reconstructor import Reconstructor, build_reconstructor
from nla_megatron.parallel.world import World
from nla_megatron.types import ModelShape

VALUE_HEAD = "value_head."
"""What the names of an AR's or a critic's head start with; no base model has them."""


def global_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by name, blocks numbered over the whole pipeline and experts over all ranks."""
    return {
        _global_name(chunk, name): parameter
        for chunk in chunks_of(model)
        for name, parameter in chunk.named_parameters()
    }


def quantized(model: Any) -> dict[str, QuantizedLinear]:
    """This rank's quantised layers by the names that their weights have for the rules; no parameters have them."""
    return {
        _global_name(chunk, f"{name}.weight"): layer
        for chunk in chunks_of(model)
        for name, layer in quantized_layers(chunk).items()
    }


class Weights(Mapping[str, Tensor]):
    """This rank's weights by the names that the rules have for them; adapters have no such name.

    What is quantised is made when it is asked for, and with `merge` so is what is adapted, its adapters added. That
    needs no other rank and changes no weight; what was made lives as long as its caller keeps it.
    """

    def __init__(self, model: Any, *, merge: bool):
        packed = quantized(model)
        self.parameters: dict[str, Tensor] = {
            name: one for name, one in global_parameters(model).items() if f".{LORA}." not in name
        }
        self.parameters |= {name: layer.weight_like for name, layer in packed.items()}
        self.made: dict[str, Any] = dict(packed)
        if merge:
            self.made |= {f"{name}.weight": linear for name, linear in adapted(model).items()}
        self.merge = merge

    def __getitem__(self, name: str) -> Tensor:
        # A training step may put a parameter's data elsewhere, so nothing of it is kept.
        if name not in self.made:
            return self.parameters[name].detach()
        return merged_local(self.made[name]) if self.merge else self.made[name].weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)


def _global_name(chunk: Any, name: str) -> str:
    match = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
    if match is None:
        return name
    block, rest = chunk.decoder.layers[int(match[1])], match[2]
    expert = re.match(r"(mlp\.experts\.local_experts\.)(\d+)(\..*)", rest)
    if expert is not None:
        rest = f"{expert[1]}{block.mlp.local_expert_indices[int(expert[2])]}{expert[3]}"
    return f"decoder.layers.{block.layer_number - 1}.{rest}"


def place_of(rule: Rule, world: World) -> tuple[int, int]:
    """(rank, size) of the tensor parallelism that cuts a rule's parameter: the experts' own for an expert."""
    return (world.tp_rank, world.tp) if rule.expert is None else (world.etp_rank, world.etp)


@torch.no_grad()
def load_from_hf(model: Any, directory: str, shape: ModelShape, world: World, *, with_head: bool) -> None:
    """Fill a model from a Hugging Face directory; each rank reads only its own slices.

    With `with_head=False` (an AR) deeper blocks, the final norm and the output layer may be there and are not read.

    Raises:
        MissingFile, CheckpointError: as `checked_weights`, or a weight that is not finite.
    """
    reader, rules = checked_weights(directory, shape, with_head=with_head), by_name(rules_of(shape, with_head))
    if with_head and shape.tied_embeddings:
        check_tied(reader)
    for name, parameter in global_parameters(model).items():
        if f".{LORA}." not in name and not name.startswith((VALUE_HEAD, f"{PROJECTIONS}.")):
            parameter.copy_(rules[name].read(reader.read, *place_of(rules[name], world)))
    for name, layer in quantized(model).items():
        layer.take(rules[name].read(reader.read, *place_of(rules[name], world)))


def load_reconstructor(
    directory: str, shape: ModelShape, world: World, dtype: str, spec: ReconstructorSpec | None = None, seed: int = 0,
    quantize: str = NONE,
) -> Reconstructor:  # fmt: skip
    """An AR on this layout: its own head from an AR's directory, one that starts as the identity from a base model's.

    Args:
        shape: already truncated to the blocks that are kept; deeper ones in the directory are not read.
        spec: how it reads; None is what the directory's sidecar says.
        seed: of its dropout.
        quantize: how the blocks' linear layers hold their weights.

    Raises:
        SidecarError: the directory's sidecar says another head than `spec`.
        MissingFile, CheckpointError: weights or head of an AR are missing, or of another shape.
    """
    # What does not say where it is read is read behind its last block, which is all that `shape` keeps.
    known = resolved_spec(directory, spec, shape.num_layers - 1)
    model = build_reconstructor(shape, world, dtype, known, seed, quantize)
    load_from_hf(model, directory, shape, world, with_head=False)
    head = head_of(directory, shape, known)
    if head is not None and model.value_head is not None:
        model.value_head.load_state_dict(head)
    return model


def load_critic(directory: str, shape: ModelShape, world: World, dtype: str) -> Critic:
    """A critic on this layout: the blocks of a policy's directory, and a head that starts at zero.

    Raises:
        MissingFile, CheckpointError: weights are missing, or of another shape.
    """
    model = build_critic(shape, world, dtype)
    load_from_hf(model, directory, shape, world, with_head=False)
    return model


class Exporter:
    """Full HF tensors from a live model: gathered over TP, handed to all ranks, one tensor at a time.

    Quantised weights are as the model computes with them; with `merge`, adapters are added. The model never changes.
    """

    def __init__(self, model: Any, shape: ModelShape, world: World, *, with_head: bool, merge: bool = False):
        self.world = world
        self.parameters: Mapping[str, Tensor] = Weights(model, merge=merge)
        self.rules = [rule for rule in rules_of(shape, with_head) if not rule.alias]
        self.experts_per_rank = shape.experts.count // world.ep if shape.experts is not None else 0
        self.stage_of = self._stages()

    def _stages(self) -> dict[str, int]:
        """Which pipeline stage owns each parameter; fixed for the model's life, so asked once."""
        stages: list[set[str]] = [{_any_expert(name) for name in self.parameters}]
        if self.world.pp > 1:
            [mine], stages = stages, [set()] * self.world.pp
            dist.all_gather_object(stages, mine, group=parallel_state.get_pipeline_model_parallel_group())
        owners: dict[str, int] = {}
        for stage, names in enumerate(stages):
            for name in names:
                owners.setdefault(name, stage)
        return owners

    def tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """(HF name, full tensor) on every rank, in the table's order; all ranks must consume it alike."""
        for rule in self.rules:
            yield from self._tensors_of(rule, dtype)

    @torch.no_grad()
    def _tensors_of(self, rule: Rule, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
        way = self._way(rule)
        tensors: dict[str, Tensor] = {}
        if all(rank == owner for _, rank, owner in way):
            tensors = rule.write(self._shards(rule))
            tensors = {name: tensor.to(dtype or tensor.dtype).contiguous() for name, tensor in tensors.items()}
        for part in rule.parts:
            yield part.hf, self._to_all(tensors.get(part.hf), rule.hf_shape(part), way, dtype)

    def _way(self, rule: Rule) -> list[tuple[dist.ProcessGroup, int, int]]:
        """The groups a tensor is broadcast over, one after the other, with this rank's and the owner's place in it."""
        way = []
        if rule.expert is not None and self.world.ep > 1:
            group = parallel_state.get_expert_model_parallel_group()
            way.append((group, self.world.ep_rank, rule.expert // self.experts_per_rank))
        if self.world.pp > 1:
            group = parallel_state.get_pipeline_model_parallel_group()
            way.append((group, self.world.pp_rank, self.stage_of[_any_expert(rule.megatron)]))
        return way

    def _shards(self, rule: Rule) -> list[Tensor]:
        mine = self.parameters[rule.megatron].detach()
        size = place_of(rule, self.world)[1]
        if rule.tp_axis is None or size == 1:
            return [mine]
        if rule.expert is None:
            group = parallel_state.get_tensor_model_parallel_group()
        else:
            group = parallel_state.get_expert_tensor_parallel_group()
        shards = [torch.empty_like(mine) for _ in range(size)]
        dist.all_gather(shards, mine.contiguous(), group=group)
        return shards

    def _to_all(
        self,
        tensor: Tensor | None,
        shape: tuple[int, ...],
        way: list[tuple[dist.ProcessGroup, int, int]],
        dtype: torch.dtype | None,
    ) -> Tensor:
        """Within the owner's stage to the ranks with other experts, then to the other stages."""
        like = next(iter(self.parameters.values()))
        full = torch.empty(shape, dtype=dtype or like.dtype, device=like.device) if tensor is None else tensor
        for at, (group, _, owner) in enumerate(way):
            if all(rank == source for _, rank, source in way[at + 1 :]):
                dist.broadcast(full, src=dist.get_global_rank(group, owner), group=group)
        return full


def _any_expert(name: str) -> str:
    """A name without its expert's number: a rank knows its own experts only, and a block's are all on one stage."""
    return re.sub(r"\.local_experts\.\d+\.", ".local_experts.*.", name)
