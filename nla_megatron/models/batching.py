"""From rows of token ids to right-padded microbatches of this rank's data-parallel share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from nla_megatron.errors import ColumnError
from nla_megatron.interventions.maths import check_vectors
from nla_megatron.parallel.world import World
from nla_megatron.types import Microbatch


@dataclass(frozen=True)
class Batch:
    """The rows of one global batch, the same on every rank; vectors are read only where a microbatch needs them.

    `ids`: token ids per row. `fields`: what the loss needs, each (N,) or (N, T) with T the longest row.
    `vectors(rows)`: activations (len(rows), D) of batch rows: injected where `positions` (the marker's index per row)
    is given, targets where it is not.
    """

    ids: Sequence[Sequence[int]]
    fields: Mapping[str, Tensor] = field(default_factory=dict)
    positions: Sequence[int] | None = None
    vectors: Callable[[Sequence[int]], np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def longest(self) -> int:
        return max(len(row) for row in self.ids)


def shares(lengths: Sequence[int], world: World, micro_batch_size: int) -> list[list[int]]:
    """This DP rank's microbatches as row indices, -1 where a microbatch is only filled up.

    Rows of like length go together, dealt to the DP ranks in turn, so that every rank has as many microbatches and
    about as many tokens as the others.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    stride = world.dp * micro_batch_size
    padded = order + [-1] * (-len(order) % stride)
    return [padded[start + world.dp_rank : start + stride : world.dp] for start in range(0, len(padded), stride)]


def microbatches(batch: Batch, world: World, micro_batch_size: int) -> list[Microbatch]:
    """This DP rank's part of a batch.

    A microbatch is as wide as its longest row. With pipeline stages or expert parallelism all are equally wide, because
    stages, and the ranks that share experts, exchange tensors of one shape.
    """
    parts = shares([len(row) for row in batch.ids], world, micro_batch_size)
    return [_microbatch(batch, rows, world) for rows in parts]


def _microbatch(batch: Batch, rows: list[int], world: World) -> Microbatch:
    real = [max(row, 0) for row in rows]
    width = batch.longest if world.pp > 1 or world.ep > 1 else max(len(batch.ids[row]) for row in real)
    ids_BT = torch.zeros(len(rows), width, dtype=torch.int64)
    for index, row in enumerate(real):
        ids_BT[index, : len(batch.ids[row])] = torch.as_tensor(batch.ids[row])
    device = world.device
    return Microbatch(
        ids=ids_BT.to(device),
        lengths=torch.tensor([len(batch.ids[row]) for row in real], device=device),
        weights=torch.tensor([float(row >= 0) for row in rows], device=device),
        rows=torch.tensor(real, device=device),
        vectors=_vectors(batch, real, device),
        positions=None
        if batch.positions is None
        else torch.tensor([batch.positions[row] for row in real], device=device),
        fields={name: _cut(values[real], width).to(device) for name, values in batch.fields.items()},
    )


def _cut(values: Tensor, width: int) -> Tensor:
    return values[:, :width] if values.dim() == 2 else values


def _vectors(batch: Batch, rows: list[int], device: torch.device) -> Tensor | None:
    if batch.vectors is None:
        return None
    vectors_BD = torch.from_numpy(np.ascontiguousarray(batch.vectors(rows)))
    if bad := check_vectors(vectors_BD):
        raise ColumnError(
            f"{bad} activations that are zero or not finite", "finite activations", "extract the table again"
        )
    return vectors_BD.to(device)


def next_token_targets(ids_BT: Tensor) -> Tensor:
    """(B, T): the token that each position predicts; the last position's is a filler that no mask includes."""
    return torch.cat([ids_BT[:, 1:], torch.zeros_like(ids_BT[:, :1])], dim=1)


def response_mask(prompt_lengths: Sequence[int], lengths: Sequence[int], width: int) -> Tensor:
    """(N, width) fp32, 1 where a response token is *predicted*: last token of the prompt to last but one of the row."""
    at = torch.arange(width)[None]
    first = torch.tensor(prompt_lengths)[:, None] - 1
    last = torch.tensor(lengths)[:, None] - 1
    return ((at >= first) & (at < last)).float()
