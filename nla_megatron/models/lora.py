"""LoRA on Megatron's linear layers: a pair of small matrices for each Hugging Face projection inside a fused layer.

An adapted layer keeps its parameters and their names. Its class becomes a subclass that adds what the pairs give, and
the pairs stand under `lora.` beside `weight`. Where tensor parallelism cuts a layer's outputs (q, k, v, gate, up), B
is cut and A is alike on every rank; where it cuts the inputs (o, down), A is cut, B is alike, and the low-rank
activation is summed over the ranks.

Legend: T tokens, B rows, I inputs and O outputs on this TP rank, R rank.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from nla_megatron.errors import LayoutError, UnsupportedModel
from nla_megatron.models.builder import chunks_of
from nla_megatron.models.lora_spec import LORA, FusedLinear, LoraSpec, Slot
from nla_megatron.models.projections import PROJECTIONS

_LEARNS = ("value_head.", f"{PROJECTIONS}.")


class Pair(nn.Module):
    """A (R, I) and B (O, R) of one projection, fp32 whatever the layer's dtype: they come and go without rounding."""

    def __init__(self, A: Tensor, B: Tensor, scale: float, inputs_cut: bool):
        super().__init__()
        self.A, self.B, self.scale = nn.Parameter(A), nn.Parameter(B), scale
        # Megatron counts a parameter without these marks once per TP group in the gradient norm.
        cut, axis = (self.A, 1) if inputs_cut else (self.B, 0)
        set_tensor_model_parallel_attributes(cut, True, axis, 1)

    def delta(self) -> Tensor:
        """What is added to this rank's part of the weight, (O, I) fp32."""
        return (self.B.detach() @ self.A.detach()) * self.scale


class Adapters(nn.Module):
    """The pairs of one fused layer."""

    def __init__(self, layer: FusedLinear, pairs: Mapping[str, Pair], spec: LoraSpec):
        super().__init__()
        self.layer, self.spec = layer, spec
        for name, pair in pairs.items():
            self.add_module(name, pair)

    @property
    def pairs(self) -> dict[str, Pair]:
        return {name: pair for name, pair in self.named_children() if isinstance(pair, Pair)}

    def forward(self, input_TBI: Tensor) -> Tensor:
        """What the pairs add to the layer's output, (T, B, O)."""
        pairs, group = self.pairs, parallel_state.get_tensor_model_parallel_group()
        dtype = input_TBI.dtype
        low_TBR = F.linear(input_TBI, torch.cat([pair.A for pair in pairs.values()]).to(dtype))
        # With the outputs cut each rank's B sends back its own part of A's gradient: the copy sums them on the way.
        over_tp = reduce_from_tensor_model_parallel_region if self.layer.inputs_cut else None
        low_TBR = (over_tp or copy_to_tensor_model_parallel_region)(low_TBR, group=group)
        lows = dict(zip(pairs, low_TBR.split([len(pair.A) for pair in pairs.values()], dim=-1), strict=True))
        added = {name: F.linear(lows[name], pair.B.to(dtype)) * pair.scale for name, pair in pairs.items()}
        return self._fused(added, input_TBI, input_TBI.shape[:-1])

    def delta(self) -> Tensor:
        """What is added to this rank's fused weight, (O, I) fp32."""
        deltas = {name: pair.delta().T for name, pair in self.pairs.items()}
        like = next(iter(deltas.values()))
        return self._fused(deltas, like, like.shape[:1]).T

    def _fused(self, outputs: Mapping[str, Tensor], like: Tensor, lead: torch.Size) -> Tensor:
        """Outputs (…, O of a projection) in the layer's own order, (…, O), zero where nothing is adapted."""
        pieces = []
        for slot in self.layer.slots:
            view = (*lead, *slot.view[:-1])
            output = outputs.get(slot.projection)
            pieces.append(like.new_zeros(view) if output is None else output.reshape(view))
        joined = pieces[0] if self.layer.axis is None else torch.cat(pieces, dim=len(lead) + self.layer.axis)
        return joined.flatten(len(lead))

    def sharded_state_dict(self, prefix: str, offsets: Any, metadata: Any) -> dict[str, Any]:
        matrix, axis = ("A", 1) if self.layer.inputs_cut else ("B", 0)
        cut = {f"{name}.{matrix}": axis for name in self.pairs}
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True), prefix, cut, offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )  # fmt: skip


class LoraLinear:
    """Mixed into a linear layer's class: adds the output of the pairs, and describes them to checkpoints."""

    lora: Adapters
    weight: nn.Parameter

    def forward(self, input_TBI: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_TBI, *args, **options)  # type: ignore[misc]
        return output + self.lora(input_TBI), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """The layer's own, with the pairs cut as they are: the layer alone would take them for replicated."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        own = {key: value for key, value in state.items() if not key.startswith(f"{prefix}{LORA}.")}
        return own | self.lora.sharded_state_dict(f"{prefix}{LORA}.", sharded_offsets, metadata)


@cache
def _with_lora(cls: type) -> type:
    return type(f"Lora{cls.__name__}", (LoraLinear, cls), {})


def linears(model: Any) -> dict[str, nn.Module]:
    """This rank's linear layers by name, blocks numbered over the whole pipeline."""
    found: dict[str, nn.Module] = {}
    for chunk in chunks_of(model):
        for block in chunk.decoder.layers:
            for name, module in block.named_modules():
                if isinstance(module, ColumnParallelLinear | RowParallelLinear):
                    found[f"decoder.layers.{block.layer_number - 1}.{name}"] = module
    return found


def adapted(model: Any) -> dict[str, Any]:
    """This rank's adapted layers (`LoraLinear`) by name, blocks numbered over the whole pipeline."""
    return {name: module for name, module in linears(model).items() if isinstance(module, LoraLinear)}


def add_lora(model: Any, layers: Sequence[FusedLinear], spec: LoraSpec, seed: int = 0) -> None:
    """Adapt the layers that hold a target, and freeze everything else but an AR's head and learned projections.

    A starts as `peft` draws it, from (seed, name) alone, so that every layout starts alike; B starts at zero.

    Raises:
        LayoutError: sequence parallelism.
        UnsupportedModel: a layer is adapted already, or is of a kind that is not known here.
    """
    here = linears(model)
    for layer in layers:
        block = layer.name.rsplit(".", 2)[0]
        if not any(slot.projection in spec.targets for slot in layer.slots):
            continue
        if layer.name in here:
            _adapt(here[layer.name], layer, spec, seed)
        elif any(name.startswith(f"{block}.") for name in here):
            raise UnsupportedModel(f"{layer.name} is no linear layer known here", "Megatron's own", "leave it out")
    for chunk in chunks_of(model):
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(f".{LORA}." in name or name.startswith(_LEARNS))


def _adapt(linear: Any, layer: FusedLinear, spec: LoraSpec, seed: int) -> None:
    if linear.config.sequence_parallel:
        raise LayoutError("LoRA with sequence parallelism", "one of the two", "switch sequence parallelism off")
    if isinstance(linear, LoraLinear):
        raise UnsupportedModel(f"{layer.name} has an adapter already", "one adapter", "merge the first one")
    pairs, device = {}, linear.weight.device
    for slot in layer.slots:
        if slot.projection in spec.targets:
            rank = spec.rank_of(slot.projection)
            A = _drawn(slot, rank, layer.inputs_cut, seed).to(device)
            B = torch.zeros(math.prod(slot.view[:-1]), rank, device=device)
            pairs[slot.projection] = Pair(A, B, spec.scale_of(slot.projection), layer.inputs_cut)
    linear.lora = Adapters(layer, pairs, spec)
    kind: Any = type(linear)
    linear.__class__ = _with_lora(kind)


def _drawn(slot: Slot, rank: int, inputs_cut: bool, seed: int) -> Tensor:
    """This rank's part of A, drawn whole."""
    tp = parallel_state.get_tensor_model_parallel_world_size() if inputs_cut else 1
    inputs = slot.view[-1] * tp
    digest = hashlib.sha256(f"{seed}:{slot.hf}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    whole = torch.empty(rank, inputs).uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
    return whole.chunk(tp, dim=1)[parallel_state.get_tensor_model_parallel_rank()] if inputs_cut else whole


@torch.no_grad()
def merged_local(linear: LoraLinear) -> Tensor:
    """A copy of this rank's weight with its pairs, if any, added in fp32; nothing is gathered, the weight stays."""
    weight = linear.weight.detach()
    if not isinstance(linear, LoraLinear):
        return weight
    return (weight.float() + linear.lora.delta()).to(weight.dtype)


def merged(model: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, merged copy) of every adapted weight of this rank, one at a time; names are numbered globally."""
    for name, linear in adapted(model).items():
        yield f"{name}.weight", merged_local(linear)


def adapter_state(model: Any, metadata: Any = None) -> dict[str, Any]:
    """The adapters' part of a model's sharded state, for a checkpoint without the base's weights."""
    state = model.sharded_state_dict(metadata=metadata)
    return {key: value for key, value in state.items() if f".{LORA}." in key}
