"""How a Megatron parameter is made of Hugging Face tensors, by view operations only.

A rule views the full parameter as an n-d array. Tensor parallelism cuts one axis of that view (`tp_axis`), the HF
tensors lie side by side along another (`slot_axis`). So a rule can be read in both directions, and which region of
which HF tensor a rank holds can be computed without touching a weight. For a rule of an expert, tensor parallelism is
expert tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

ReadSlice = Callable[[str, int, int, int], Tensor]
"""(name, axis, start, stop) -> that slice of an HF tensor."""


@dataclass(frozen=True)
class Part:
    """An HF tensor and how many slots it takes along the rule's slot axis."""

    hf: str
    slots: int = 1


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter.

    Args:
        megatron: its name, blocks and experts numbered globally.
        view: the full parameter's shape, seen as an n-d array.
        parts: the HF tensors, in slot order.
        tp_axis: the axis of `view` that tensor parallelism cuts; None for replicated parameters.
        slot_axis: the axis along which the parts lie; None for a single part.
        rows: real rows of axis 0 where the vocabulary is padded; None where nothing is padded.
        alias: the same HF tensor is exported by another rule (tied embeddings on the last stage).
        expert: its global number; None for what is no expert's.
        vector: the parameter and its HF tensors have one axis (biases, norms), into which the view's axes merge; else
            they are matrices, whose columns are the view's last axis.

    Example: q, k and v of a grouped-query attention with 2 groups of 2 heads, head width 8, hidden size 32:
        >>> Rule("…linear_qkv.weight", (2, 4, 8, 32), (Part(q, 2), Part(k), Part(v)), tp_axis=0, slot_axis=1)
    """

    megatron: str
    view: tuple[int, ...]
    parts: tuple[Part, ...]
    tp_axis: int | None = None
    slot_axis: int | None = None
    rows: int | None = None
    alias: bool = False
    expert: int | None = None
    vector: bool = False

    def local_view(self, tp: int) -> tuple[int, ...]:
        """The view's shape on one TP rank."""
        return tuple(size // tp if axis == self.tp_axis else size for axis, size in enumerate(self.view))

    def part_view(self, part: Part, tp: int = 1) -> tuple[int, ...]:
        return tuple(part.slots if axis == self.slot_axis else size for axis, size in enumerate(self.local_view(tp)))

    def hf_shape(self, part: Part) -> tuple[int, ...]:
        """The HF tensor's shape: the view's leading axes merged into rows."""
        if self.rows is not None:
            return (self.rows, *self.view[1:])
        return self._merged(self.part_view(part))

    def _merged(self, view: tuple[int, ...]) -> tuple[int, ...]:
        return (prod(view),) if self.vector else (prod(view[:-1]), view[-1])

    def slice_of(self, part: Part, tp_rank: int, tp: int) -> tuple[int, int, int]:
        """(axis, start, stop) of the HF tensor that one TP rank holds."""
        shape = self.hf_shape(part)
        if self.tp_axis is None:
            return 0, 0, shape[0]
        view = self.part_view(part)
        per_rank = view[self.tp_axis] // tp
        if self.tp_axis == len(view) - 1 and not self.vector:
            return 1, tp_rank * per_rank, (tp_rank + 1) * per_rank
        if prod(view[: self.tp_axis]) != 1:
            raise AssertionError(f"{self.megatron}: the TP axis is not the outermost of {part.hf}")
        inner = prod(view[self.tp_axis + 1 :]) if self.vector else prod(view[self.tp_axis + 1 : -1])
        start, stop = tp_rank * per_rank * inner, (tp_rank + 1) * per_rank * inner
        return 0, min(start, shape[0]), min(stop, shape[0])

    def read(self, read: ReadSlice, tp_rank: int, tp: int) -> Tensor:
        """This TP rank's parameter, made of slices of the HF tensors; padding rows are zero."""
        pieces = []
        for part in self.parts:
            piece = read(part.hf, *self.slice_of(part, tp_rank, tp))
            view = self.part_view(part, tp)
            if self.rows is not None and piece.shape[0] < view[0]:
                piece = torch.cat([piece, piece.new_zeros(view[0] - piece.shape[0], *view[1:])])
            pieces.append(piece.reshape(view))
        local = pieces[0] if self.slot_axis is None else torch.cat(pieces, dim=self.slot_axis)
        return local.reshape(self._merged(self.local_view(tp)))

    def write(self, shards: list[Tensor]) -> dict[str, Tensor]:
        """The HF tensors, from the parameter's shards of all TP ranks in order (one shard where it is replicated)."""
        views = [shard.reshape(self.local_view(len(shards) if self.tp_axis is not None else 1)) for shard in shards]
        full = torch.cat(views, dim=self.tp_axis) if self.tp_axis is not None else views[0]
        if self.slot_axis is None:
            tensors = [full]
        else:
            tensors = list(full.split([part.slots for part in self.parts], dim=self.slot_axis))
        out = {}
        for part, tensor in zip(self.parts, tensors, strict=True):
            out[part.hf] = tensor.reshape(self._merged(tuple(tensor.shape)))[: self.rows].contiguous()
        return out


def by_name(rules: list[Rule]) -> Mapping[str, Rule]:
    return {rule.megatron: rule for rule in rules}
