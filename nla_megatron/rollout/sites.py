"""A site: one intervention in one model, with the static buffers that every forward pass reads.

vLLM keeps the residual stream as the sum of two tensors. Norms are those of the sum, and the change goes into one of
them. Legend: T tokens of a batch, S slots, D hidden, F strengths of a slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from nla_megatron.interventions.maths import Formula, Slots, apply_whole, tokens_per_slot
from nla_megatron.interventions.placement import UNTOUCHED
from nla_megatron.interventions.spec import VECTOR_MODES, Intervention


class Site:
    """Where an intervention happens.

    `slots` is what the operator reads: `slot_T` (tokens,) int32, `table_SD` and `strength_SF` a row for each vector of
    each request that is under way, `factor_T` (tokens,) the schedule over decode steps. `applied_S` counts, on the
    device, the tokens that were changed. The host's copies of the buffers per token are `host_slot_T` and
    `host_factor_T`; on the CPU they are the buffers themselves.
    """

    def __init__(
        self, intervention: Intervention, formula: Formula, tokens: int, slots: int, width: int, device: torch.device
    ):
        self.intervention, self.formula, self.device = intervention, formula, device
        self.factors = np.array(intervention.decode_factors(), dtype=np.float32)
        table_width, rows = width if intervention.takes_vectors else 0, slots * intervention.vectors
        self.slots = Slots(
            slot_T=torch.full((tokens,), UNTOUCHED, dtype=torch.int32, device=device),
            table_SD=torch.zeros(rows, table_width, device=device),
            strength_SF=torch.zeros(rows, intervention.num_strengths, device=device),
            factor_T=torch.full((tokens,), float(self.factors[0]), device=device),
        )
        assert self.slots.factor_T is not None
        self.applied_S = torch.zeros(rows, dtype=torch.int64, device=device)
        on_host = device.type == "cpu"
        self._slot = self.slots.slot_T if on_host else self.slots.slot_T.cpu().pin_memory()
        self._factor = self.slots.factor_T if on_host else self.slots.factor_T.cpu().pin_memory()
        self.host_slot_T, self.host_factor_T = self._slot.numpy(), self._factor.numpy()
        self.rows_N: Tensor | None = None
        self._dirty = 0

    @property
    def follows_decoding(self) -> bool:
        """Tokens are touched that the model has written itself."""
        return self.intervention.where in ("generated", "all")

    def clear(self) -> None:
        """Forget the marks of the last batch."""
        self.host_slot_T[: self._dirty] = UNTOUCHED

    def send(self, rows: np.ndarray) -> None:
        """Hand over the marks of this batch: `rows` (N,) are the tokens marked, in any order."""
        end = int(rows.max()) + 1 if len(rows) else 0
        if self.device.type == "cpu":
            self.rows_N = torch.from_numpy(rows) if len(rows) else None
        elif stale := max(end, self._dirty):
            self.slots.slot_T[:stale].copy_(self._slot[:stale], non_blocking=True)
            if len(self.factors) > 1 and self.slots.factor_T is not None:
                self.slots.factor_T[:stale].copy_(self._factor[:stale], non_blocking=True)
        self._dirty = end

    def fill(self, slots: list[int], vectors: Sequence[np.ndarray | None], strength_NF: Tensor) -> None:
        """Put N requests into slots: their vectors (D,) or (K, D), None for one without any, and strengths (N, F)."""
        index = self._rows_of(slots)
        strengths = strength_NF.repeat_interleave(self.intervention.vectors, dim=0)
        self.slots.strength_SF[index] = strengths.to(self.device, non_blocking=True)
        if any(vector_D is not None for vector_D in vectors):
            nothing = np.zeros((self.intervention.vectors, self.slots.table_SD.shape[1]), dtype=np.float32)
            rows = [nothing if each is None else each.reshape(nothing.shape) for each in vectors]
            vectors_ND = torch.from_numpy(np.concatenate(rows))
            self.slots.table_SD[index] = vectors_ND.to(self.device, non_blocking=True)

    def take_applied(self, slots: list[int]) -> Tensor:
        """The counts of some slots, (N,) on the device, which start again at 0."""
        index = self._rows_of(slots)
        counts_N = self.applied_S[index].view(len(slots), -1).sum(dim=1)
        self.applied_S[index] = 0
        return counts_N

    def _rows_of(self, slots: list[int]) -> Tensor:
        """The rows of the tables that N slots have, (N K,), as `placement.mark` names them."""
        count = self.intervention.vectors
        rows = [slot * count + number for slot in slots for number in range(count)]
        return torch.tensor(rows).to(self.device, non_blocking=True)

    def change(self, hidden_TD: Tensor, residual_TD: Tensor | None) -> None:
        """Change `hidden` so that its sum with `residual` is the stream after the intervention."""
        if self.device.type == "cpu":
            # The host knows the marked tokens: on a CPU it may leave out the work that a captured graph cannot.
            if self.rows_N is not None:
                self._change_rows(self.rows_N, hidden_TD, residual_TD)
        elif self.intervention.formula in VECTOR_MODES:
            from nla_megatron.rollout.kernel import launch

            launch(self.intervention.formula, hidden_TD, residual_TD, self.slots, self.applied_S)
        else:
            self._change_masked(hidden_TD, residual_TD)

    def _change_rows(self, rows_N: Tensor, hidden_TD: Tensor, residual_TD: Tensor | None) -> None:
        slots, picked = self.slots, self.slots.slot_T[rows_N]
        assert slots.factor_T is not None
        stream_ND = hidden_TD[rows_N]
        if residual_TD is not None:
            stream_ND = stream_ND + residual_TD[rows_N]
        touched = replace(slots, slot_T=picked, factor_T=slots.factor_T[rows_N])
        after_ND = apply_whole(self.formula, stream_ND, touched)
        if residual_TD is not None:
            after_ND = (after_ND.float() - residual_TD[rows_N].float()).to(hidden_TD.dtype)
        hidden_TD[rows_N] = after_ND
        self.applied_S += tokens_per_slot(picked, len(self.applied_S))

    def _change_masked(self, hidden_TD: Tensor, residual_TD: Tensor | None) -> None:
        """Over all tokens, so that a captured graph serves every batch of its size."""
        count, slots = len(hidden_TD), self.slots
        assert slots.factor_T is not None
        marked = replace(slots, slot_T=slots.slot_T[:count], factor_T=slots.factor_T[:count])
        stream_TD = hidden_TD if residual_TD is None else hidden_TD + residual_TD
        after_TD = apply_whole(self.formula, stream_TD, marked)
        if residual_TD is not None:
            after_TD = (after_TD.float() - residual_TD.float()).to(hidden_TD.dtype)
        hidden_TD.copy_(torch.where((marked.slot_T >= 0)[:, None], after_TD, hidden_TD))
        self.applied_S += tokens_per_slot(marked.slot_T, len(self.applied_S))
