"""The formulas on plain tensors (Karvonen et al. for `norm_add`; the NLA paper for `replace`), one token or all.

A `Formula` computes in fp32, whatever the residual stream's dtype, on a batch of tokens that are all touched. The
`apply` functions put it at the tokens that a slot number marks. The masked ones look at no value to decide what to run,
so they can live in a compiled or captured graph; the indexed ones work on the touched tokens only.

Legend: N touched tokens, T tokens, D hidden, S slots, F strengths of a slot (1 unless features are steered).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_NOTHING = -0.0  # x + -0.0 is x bit for bit, also where x is -0.0


def _unit(vectors_ND: Tensor) -> Tensor:
    vectors = vectors_ND.float()
    return vectors / vectors.norm(dim=-1, keepdim=True)


def norm_add(stream_ND: Tensor, vectors_ND: Tensor, scale: float | Tensor) -> Tensor:
    """x + scale * |x| * v / |v|: the activation's direction at the stream's own size."""
    return stream_ND.float() + _norm_add(stream_ND, vectors_ND, scale)


def add(stream_ND: Tensor, vectors_ND: Tensor, scale: float | Tensor) -> Tensor:
    """x + scale * v."""
    return stream_ND.float() + _add(stream_ND, vectors_ND, scale)


def replace(stream_ND: Tensor, vectors_ND: Tensor, scale: float | Tensor) -> Tensor:
    """scale * v / |v|: nothing of the stream is left."""
    return (scale * _unit(vectors_ND)).expand(stream_ND.shape)


def _norm_add(stream_ND: Tensor, vectors_ND: Tensor, scale: float | Tensor) -> Tensor:
    return scale * stream_ND.float().norm(dim=-1, keepdim=True) * _unit(vectors_ND)


def _add(stream_ND: Tensor, vectors_ND: Tensor, scale: float | Tensor) -> Tensor:
    return scale * vectors_ND.float()


def _replace(stream_ND: Tensor, vectors_ND: Tensor, scale: float | Tensor) -> Tensor:
    return replace(stream_ND, vectors_ND, scale) - stream_ND.float()


Change = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(stream (N, D), vectors (N, D), strengths (N, F)) -> (N, D) in fp32."""


@dataclass(frozen=True)
class Formula:
    """What an intervention does to touched tokens: `change` is what it adds, `whole` the stream after it."""

    change: Change
    whole: Change

    @classmethod
    def adding(cls, change: Change) -> Formula:
        """A formula whose whole is the stream plus the change."""
        return cls(change, lambda stream, vectors, strength: stream.float() + change(stream, vectors, strength))


FORMULAS = {"norm_add": Formula(_norm_add, norm_add), "add": Formula(_add, add), "replace": Formula(_replace, replace)}


@dataclass(frozen=True)
class Slots:
    """What the tokens of a forward pass take, in buffers that an engine may fill again before each pass.

    `slot_T` (T,) int32 or int64, a row of the tables, -1 for none; `table_SD` (S, D) fp32, one vector per slot, (S, 0)
    for formulas without vectors; `strength_SF` (S, F) fp32; `factor_T` (T,) fp32, a further factor on the strengths of
    each token, such as a schedule over decode steps, None for 1. S is at least 1. Rows that no token names may hold
    anything.
    """

    slot_T: Tensor
    table_SD: Tensor
    strength_SF: Tensor
    factor_T: Tensor | None = None


def apply(formula: Formula, stream_TD: Tensor, slots: Slots) -> Tensor:
    """What to add to the stream: (T, D) in the stream's dtype, `-0.0` at untouched tokens, which then stay bit for bit.

    Args:
        formula: of `FORMULAS`, or a `steering.Steering`'s.
        stream_TD: the full residual stream; untouched tokens may hold anything, also NaN.
    """
    touched_T1, inputs = _masked(stream_TD, slots)
    # Not the constant: compilers lose the sign of a written zero, but not of a computed one.
    nothing_T1 = -touched_T1.float()
    return torch.where(touched_T1, formula.change(*inputs), nothing_T1).to(stream_TD.dtype)


def apply_whole(formula: Formula, stream_TD: Tensor, slots: Slots) -> Tensor:
    """As `apply`, but the stream afterwards, rounded once."""
    touched_T1, inputs = _masked(stream_TD, slots)
    return torch.where(touched_T1, formula.whole(*inputs).to(stream_TD.dtype), stream_TD)


def apply_indexed(formula: Formula, stream_TD: Tensor, slots: Slots, rows_N: Tensor | None = None) -> Tensor:
    """The same numbers as `apply`, computed for touched tokens only.

    Args:
        rows_N: (N,) int64, the touched tokens where the caller knows them; None looks, and so waits for the device.
    """
    rows_N = touched_rows(slots.slot_T) if rows_N is None else rows_N
    change_ND = formula.change(*_picked(stream_TD, slots, rows_N)).to(stream_TD.dtype)
    return torch.full_like(stream_TD, _NOTHING).index_put((rows_N,), change_ND)


def apply_whole_indexed(formula: Formula, stream_TD: Tensor, slots: Slots, rows_N: Tensor | None = None) -> Tensor:
    """The same numbers as `apply_whole`, computed for touched tokens only; `rows_N` as for `apply_indexed`."""
    rows_N = touched_rows(slots.slot_T) if rows_N is None else rows_N
    return stream_TD.index_put((rows_N,), formula.whole(*_picked(stream_TD, slots, rows_N)).to(stream_TD.dtype))


def touched_rows(slot_T: Tensor) -> Tensor:
    """The tokens with a slot, in order: (N,) int64. Their number depends on values: not for captured graphs."""
    return (slot_T >= 0).nonzero()[:, 0]


def tokens_per_slot(slot_T: Tensor, slots: int) -> Tensor:
    """How many tokens name each slot: (S,) int64, for the account of what was injected."""
    touched_T = slot_T >= 0
    counts_S = torch.zeros(slots, dtype=torch.int64, device=slot_T.device)
    return counts_S.index_add(0, slot_T.clamp_min(0).long(), touched_T.long())


def _masked(stream_TD: Tensor, slots: Slots) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The mask, and inputs in which untouched tokens are ones: no NaN of theirs reaches a value or a gradient."""
    touched_T1 = (slots.slot_T >= 0)[:, None]
    row_T = slots.slot_T.clamp_min(0).long()
    strength_TF = slots.strength_SF[row_T]
    if slots.factor_T is not None:
        strength_TF = strength_TF * slots.factor_T[:, None]
    inputs = (stream_TD.float(), slots.table_SD[row_T].float(), strength_TF.float())
    stream, vectors, strength = (torch.where(touched_T1, values, 1.0) for values in inputs)
    return touched_T1, (stream, vectors, strength)


def _picked(stream_TD: Tensor, slots: Slots, rows_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    slot_N = slots.slot_T[rows_N].long()
    strength_NF = slots.strength_SF[slot_N].float()
    if slots.factor_T is not None:
        strength_NF = strength_NF * slots.factor_T[rows_N, None]
    return stream_TD[rows_N].float(), slots.table_SD[slot_N].float(), strength_NF


def check_vectors(vectors_ND: Tensor) -> int:
    """Vectors, of one row or several (N, K, D), that cannot be injected: not finite, or of no direction."""
    norms = vectors_ND.float().norm(dim=-1)
    return int((~torch.isfinite(norms) | (norms == 0)).sum())
