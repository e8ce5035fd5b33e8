"""What every rank of the trainer holds, from rules, shape and layout alone: no weights, no process groups.

A parameter is a row-major view whose leading axes merge into an HF tensor's rows. Where tensor parallelism or a
neighbour's slots come between them (q, k and v lie group by group), a part is several pieces; the plan fuses them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from torch import Tensor

from nla_megatron.conversion.families import rules_of
from nla_megatron.conversion.live import Weights, global_parameters, quantized
from nla_megatron.conversion.rules import Part, Rule
from nla_megatron.models.builder import blocks_per_chunk, check_layout
from nla_megatron.models.lora_spec import LORA
from nla_megatron.parallel.world import World
from nla_megatron.reshard.carriers import Claim, Group
from nla_megatron.reshard.regions import Piece, Region, contiguous
from nla_megatron.types import ModelShape

_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True)
class TrainLayout:
    """How the trainer lies on its ranks, which are `first` and those behind it; fields as in `World`."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int = 1
    vpp: int = 1
    stages: tuple[int, ...] | None = None
    first: int = 0
    sequence_parallel: bool = False  # it divides tokens, and no weight

    @property
    def ranks(self) -> range:
        return range(self.first, self.first + self.tp * self.pp * self.dp)

    @classmethod
    def of(cls, world: World) -> TrainLayout:
        return cls(world.tp, world.pp, world.dp, world.ep, world.etp, world.vpp, world.stages)


class _Groups:
    """Who shares pieces: ranks by stage, and by their place in the dense grid or in the experts'."""

    def __init__(self, layout: TrainLayout):
        self.members: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        self.made: dict[tuple[int, ...], Group] = {}
        for place, rank in enumerate(layout.ranks):
            # megatron-core's order: tp fastest, then dp, pp slowest; experts share a stage out anew, etp fastest.
            stage, within = divmod(place, layout.tp * layout.dp)
            self.members["all", stage].append(rank)
            self.members["tp", stage, within % layout.tp].append(rank)
            ep_rank = within // layout.etp % layout.ep
            self.members["ep", stage, ep_rank].append(rank)
            self.members["etp", stage, ep_rank, within % layout.etp].append(rank)

    def of(self, rule: Rule, stages: tuple[int, ...], owner: int | None, tp_rank: int) -> Group:
        ranks: list[int] = []
        for stage in stages:
            if owner is None:
                key: tuple[Any, ...] = ("all", stage) if rule.tp_axis is None else ("tp", stage, tp_rank)
            else:
                key = ("ep", stage, owner) if rule.tp_axis is None else ("etp", stage, owner, tp_rank)
            ranks += self.members[key]
        return self.made.setdefault(tuple(ranks), Group(len(self.made), tuple(ranks)))


def claims_of(
    shape: ModelShape, layout: TrainLayout, *, with_head: bool = True, rules: Sequence[Rule] | None = None
) -> list[Claim]:
    """Every place that holds a region of an HF tensor, in the table's order; `rules` are other than the model's.

    Raises:
        LayoutError: the model cannot lie so.
    """
    check_layout(shape, layout, "convert")
    groups, claims = _Groups(layout), []
    stage_of_block = [
        chunk % layout.pp
        for chunk, blocks in enumerate(blocks_per_chunk(shape.num_layers, layout))
        for _ in range(blocks)
    ]
    for rule in rules_of(shape, with_head) if rules is None else rules:
        # A tied output layer holds what the embedding holds, and is found under its name.
        if rule.alias:
            continue
        stages = _stages(rule, stage_of_block, layout.pp, shape.tied_embeddings and with_head)
        owner, tp = None, layout.tp
        if rule.expert is not None:
            assert shape.experts is not None
            owner, tp = rule.expert // (shape.experts.count // layout.ep), layout.etp
        for tp_rank in range(1 if rule.tp_axis is None else tp):
            group = groups.of(rule, stages, owner, tp_rank)
            claims += [Claim(piece, group) for piece in pieces(rule, tp_rank, tp)]
    return claims


def tensors_of(shape: ModelShape, *, with_head: bool = True) -> dict[str, tuple[int, ...]]:
    """The model's HF tensors and their shapes."""
    rules = rules_of(shape, with_head)
    return {part.hf: rule.hf_shape(part) for rule in rules if not rule.alias for part in rule.parts}


def _stages(rule: Rule, stage_of_block: list[int], pp: int, tied: bool) -> tuple[int, ...]:
    block = re.match(r"decoder\.layers\.(\d+)\.", rule.megatron)
    if block is not None:
        return (stage_of_block[int(block[1])],)
    if rule.megatron == _EMBEDDING:
        return (0, pp - 1) if tied and pp > 1 else (0,)
    return (pp - 1,)


def pieces(rule: Rule, tp_rank: int, tp: int) -> Iterator[Piece]:
    """The regions of HF tensors that one TP rank's parameter holds, and where in it."""
    strides, slot = contiguous(rule.local_view(tp)), 0
    for part in rule.parts:
        offset = 0 if rule.slot_axis is None else slot * strides[rule.slot_axis]
        slot += part.slots
        yield from _pieces_of(rule, part, tp_rank, tp, strides, offset)


def _pieces_of(rule: Rule, part: Part, tp_rank: int, tp: int, strides: tuple[int, ...], offset: int) -> Iterator[Piece]:
    axes = [range(size) for size in rule.hf_shape(part)]
    axis, start, stop = rule.slice_of(part, tp_rank, tp)
    axes[axis] = range(start, stop)
    rows, *columns = axes
    view = rule.part_view(part, tp)
    leading = list(zip(view, strides, strict=True))[: len(view) - len(columns)]
    *outer, (length, stride) = _merged(leading)
    for number, index in enumerate(product(*(range(size) for size, _ in outer))):
        first = rows.start + number * length
        # Rows that pad the vocabulary are nobody's.
        if first < rows.stop:
            at = offset + sum(place * step for place, (_, step) in zip(index, outer, strict=True))
            region = Region(part.hf, (range(first, min(first + length, rows.stop)), *columns))
            yield Piece(region, rule.megatron, at, (stride, *strides[len(leading) :]))


def _merged(dims: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(size, stride) of row-major axes, those merged that lie behind each other without a gap."""
    out = [dims[-1]]
    for size, stride in reversed(dims[:-1]):
        inner, step = out[0]
        if inner == 1 or stride == inner * step:
            out[0] = (size * inner, step if inner > 1 else stride)
        elif size > 1:
            out.insert(0, (size, stride))
    return out


class Sources(Weights):
    """This rank's weights under the names of the claims; adapters are merged.

    Args:
        masters: by the names of their claims; see `masters`.
    """

    def __init__(self, model: Any, world: World, masters: Mapping[str, Tensor] | None = None):
        super().__init__(model, merge=True)
        self.checked: dict[str, Tensor] = {**global_parameters(model), **(masters or {})}
        # A code is a number whatever it is: what may be none is a scale.
        self.checked |= {f"the scales of {name}": layer.scales for name, layer in quantized(model).items()}
        if world.pp > 1 and _OUTPUT in self.parameters:
            self.parameters.setdefault(_EMBEDDING, self.parameters[_OUTPUT])
        self.parameters.update(masters or {})


class AdapterSources(Sources):
    """This rank's A and B alone."""

    def __init__(self, model: Any):
        everything: dict[str, Tensor] = dict(global_parameters(model))
        self.parameters = self.checked = {name: one for name, one in everything.items() if f".{LORA}." in name}
        self.made, self.merge = {}, False
