"""From rows of token ids to right-padded microbatches of this rank's data-parallel share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nla_megatron.errors import ColumnError, InjectionError
from nla_megatron.interventions.maths import check_vectors
from nla_megatron.interventions.placement import filled
from nla_megatron.parallel.world import World
from nla_megatron.types import Injection, Microbatch, Steering, Strengths

_ROWS = "correct the rows of the batch"


@dataclass(frozen=True)
class Batch:
    """The rows of one global batch, the same on every rank; vectors are read only where a microbatch needs them.

    `ids`: token ids per row. `fields`: what the loss needs, each (N,) or (N, T) with T the longest row.
    `vectors(rows)`: activations (len(rows), D) of batch rows, or (len(rows), K, D) where rows bring several, with NaN
    in front where one brings fewer: what interventions take where `positions` or `prompt_lengths` are given, targets
    where they are not. `positions`: of each row, one or several indices in its prompt; `only`, `strengths`,
    `training_step` and `steering` as in `types.Injection`; an AR's dropout is drawn by the step too.
    """

    ids: Sequence[Sequence[int]]
    fields: Mapping[str, Tensor] = field(default_factory=dict)
    positions: Sequence[int | Sequence[int]] | None = None
    vectors: Callable[[Sequence[int]], np.ndarray] | None = None
    prompt_lengths: Sequence[int] | None = None
    only: Sequence[tuple[int, ...] | None] | None = None
    strengths: Sequence[Strengths | None] | None = None
    training_step: int = 0
    steering: Steering | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def longest(self) -> int:
        return max(len(row) for row in self.ids)

    def places(self, row: int) -> tuple[int, ...]:
        """The positions of a row."""
        return () if self.positions is None else _several(self.positions[row])

    def injection(
        self, rows: Sequence[int], vectors: Tensor | None, brought: tuple[int, ...] | None = None
    ) -> Injection | None:
        """What the interventions of these rows need; None where the batch has none."""
        if self.positions is None and self.prompt_lengths is None:
            return None

        def picked(values: Sequence[Any] | None) -> tuple[Any, ...] | None:
            return None if values is None else tuple(values[row] for row in rows)

        return Injection(
            vectors=vectors,
            lengths=tuple(len(self.ids[row]) for row in rows),
            prompt_lengths=picked(self.prompt_lengths),
            positions=None if self.positions is None else tuple(self.places(row) for row in rows),
            only=picked(self.only),
            strengths=picked(self.strengths),
            training_step=self.training_step,
            steering=self.steering,
            rows=tuple(rows),
            brought=brought,
        )

    def check(self) -> None:
        """Every rank has the whole batch, so a wrong row stops all of them.

        Raises:
            InjectionError: a prompt longer than its row, or positions that are not different tokens of it.
        """
        if self.positions is None and self.prompt_lengths is None:
            return
        lengths = [len(row) for row in self.ids]
        prompts = lengths if self.prompt_lengths is None else self.prompt_lengths
        for row, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
            if not 0 < prompt <= length:
                raise InjectionError(
                    f"a prompt of {prompt} tokens in row {row}, which has {length}", f"1 to {length}", _ROWS
                )
        for row, prompt in enumerate(prompts):
            places = self.places(row)
            if len(set(places)) < len(places) or not all(0 <= place < prompt for place in places):
                raise InjectionError(
                    f"positions {list(places)} in row {row}, whose prompt has {prompt} tokens",
                    f"different positions, 0 to {prompt - 1}", _ROWS,
                )  # fmt: skip


def _several(positions: int | Sequence[int]) -> tuple[int, ...]:
    return (positions,) if isinstance(positions, int) else tuple(positions)


def check_ids(largest: int, vocab_size: int) -> None:
    """Raises ColumnError for a token that the model has no row for: it would be one that only fills the matrix up."""
    if largest >= vocab_size:
        raise ColumnError(
            f"token id {largest} among the rows of a batch", f"ids below the model's vocabulary of {vocab_size}",
            "take the model's own tokenizer, or resize the model's embedding to the tokenizer",
        )  # fmt: skip


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
    stages, and the ranks that share experts, exchange tensors of one shape. With sequence parallelism the width divides
    among the TP ranks. Interleaved stages take microbatches in groups of as many as there are stages; rows of weight 0
    fill the last one.

    Raises:
        InjectionError: as `Batch.check`.
    """
    batch.check()
    parts = shares([len(row) for row in batch.ids], world, micro_batch_size)
    if world.vpp > 1:
        parts += [[-1] * micro_batch_size] * (-len(parts) % world.pp)
    return [_microbatch(batch, rows, world) for rows in parts]


def _microbatch(batch: Batch, rows: list[int], world: World) -> Microbatch:
    real = [max(row, 0) for row in rows]
    width = batch.longest if world.pp > 1 or world.ep > 1 else max(len(batch.ids[row]) for row in real)
    if world.sequence_parallel:
        width += -width % world.tp
    ids_BT = torch.zeros(len(rows), width, dtype=torch.int64)
    for index, row in enumerate(real):
        ids_BT[index, : len(batch.ids[row])] = torch.as_tensor(batch.ids[row])
    device = world.device
    vectors, brought = _vectors(batch, real, device)
    return Microbatch(
        ids=ids_BT.to(device),
        lengths=torch.tensor([len(batch.ids[row]) for row in real], device=device),
        weights=torch.tensor([float(row >= 0) for row in rows], device=device),
        rows=torch.tensor(real, device=device),
        vectors=vectors,
        injection=batch.injection(real, vectors, brought),
        fields={name: _fitted(values[real], width).to(device) for name, values in batch.fields.items()},
        training_step=batch.training_step,
    )


def _fitted(values: Tensor, width: int) -> Tensor:
    """Fields per token, cut or filled up with zeros to the microbatch's width."""
    return F.pad(values, (0, width - values.shape[1])) if values.dim() == 2 else values


def _vectors(batch: Batch, rows: list[int], device: torch.device) -> tuple[Tensor | None, tuple[int, ...] | None]:
    """Of these rows, and how many each brings, where they bring several."""
    if batch.vectors is None:
        return None, None
    raw, brought = batch.vectors(rows), None
    if raw.ndim == 3:
        raw, counts = filled(raw, [len(batch.places(row)) for row in rows])
        brought = tuple(counts.tolist())
    vectors_BD = torch.from_numpy(np.ascontiguousarray(raw))
    if bad := check_vectors(vectors_BD):
        raise ColumnError(
            f"{bad} activations that are zero or not finite", "finite activations", "extract the table again"
        )
    return vectors_BD.to(device), brought


def next_token_targets(ids_BT: Tensor) -> Tensor:
    """(B, T): the token that each position predicts; the last position's is a filler that no mask includes."""
    return torch.cat([ids_BT[:, 1:], torch.zeros_like(ids_BT[:, :1])], dim=1)


def response_mask(prompt_lengths: Sequence[int], lengths: Sequence[int], width: int) -> Tensor:
    """(N, width) fp32, 1 where a response token is *predicted*: last token of the prompt to last but one of the row."""
    at = torch.arange(width)[None]
    first = torch.tensor(prompt_lengths)[:, None] - 1
    last = torch.tensor(lengths)[:, None] - 1
    return ((at >= first) & (at < last)).float()
