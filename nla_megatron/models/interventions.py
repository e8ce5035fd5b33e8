"""Interventions in a Megatron model: each microbatch's data, in the order and the part of the tokens of this rank.

The data of a microbatch travels as an argument of the forward pass and never stays on a module: a pipeline schedule
runs other microbatches before the backward pass of this one, and recomputation runs its blocks again then.
Legend: B rows, T tokens (this rank's part with sequence parallelism), N touched tokens, D hidden, E width of vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from nla_megatron.errors import InjectionError, WidthError
from nla_megatron.interventions.checks import check_brought, check_layers
from nla_megatron.interventions.maths import Formula, Slots, apply_whole_indexed
from nla_megatron.interventions.placement import UNTOUCHED, row_slots, taken
from nla_megatron.interventions.projection import Drop, Projection
from nla_megatron.interventions.sae_files import load_sae
from nla_megatron.interventions.spec import EMBEDDING, Intervention
from nla_megatron.interventions.steering import formula_of
from nla_megatron.models.builder import chunks_of
from nla_megatron.models.dropout import ProjectionDropout
from nla_megatron.models.projections import PROJECTIONS, projection_of
from nla_megatron.types import Injection, Microbatch, Steering

_DATA = "build the batch for the interventions that the model was given"


@dataclass(frozen=True)
class Chosen:
    """Strengths that have a gradient, of one intervention on the rows of one microbatch."""

    steering: Steering
    rows_B: Tensor
    columns: tuple[int, int]
    factor: float

    def strengths(self) -> Tensor:
        """(B, F) fp32."""
        return self.steering.values[self.rows_B, slice(*self.columns)] * self.factor


@dataclass(frozen=True)
class Change:
    """One intervention on one microbatch; calling it gives the stream afterwards, (T, B, D).

    `slots` and `rows_N` count tokens as the stream stores them, tokens first. Projection and chosen strengths are part
    of the call, so that a recomputed block builds their gradients anew.
    """

    formula: Formula
    slots: Slots
    rows_N: Tensor
    projection: Projection | None = None
    drop: Drop | None = None
    chosen: Chosen | None = None

    def __call__(self, stream_TBD: Tensor) -> Tensor:
        slots = self.slots
        if self.projection is not None:
            slots = replace(slots, table_SD=self.projection(slots.table_SD, self.drop))
        if self.chosen is not None:
            slots = replace(slots, strength_SF=self.chosen.strengths())
        flat = stream_TBD.reshape(-1, stream_TBD.shape[-1])
        return apply_whole_indexed(self.formula, flat, slots, self.rows_N).view_as(stream_TBD)


Changes = Mapping[int | str, Sequence[Change]]
"""By block (0-based, over the whole pipeline) or "embedding", in the order in which they were asked for."""


class Sites:
    """The interventions of a model, of which a chunk runs those at its own blocks.

    Args:
        interventions: all of the model's, in order.
        formulas: one each.
        places: the blocks of this chunk, and "embedding" where it embeds.
        projections: of this chunk's interventions that project, by number.
        dropout: of the projections.
    """

    def __init__(
        self,
        interventions: tuple[Intervention, ...],
        formulas: Sequence[Formula],
        places: set[int | str],
        projections: Mapping[int, Projection],
        hidden_size: int,
        sequence_parallel: bool,
        dropout: ProjectionDropout,
    ):
        self.interventions, self.formulas, self.projections = interventions, formulas, projections
        self.here = [number for number, each in enumerate(interventions) if each.layer in places]
        self.hidden_size, self.sequence_parallel, self.dropout = hidden_size, sequence_parallel, dropout

    def changes(self, batch: Microbatch) -> Changes:
        """What this chunk does to a microbatch; nothing where the batch says nothing of interventions."""
        injection = batch.injection
        if injection is None:
            return {}
        found: dict[int | str, list[Change]] = {}
        for number in self.here:
            change = self._change(number, injection, batch.ids)
            if change is not None:
                found.setdefault(self.interventions[number].layer, []).append(change)
        return found

    def check(self, batch: Microbatch) -> None:
        """Whether a microbatch has what all of the model's interventions need, those of other stages included.

        Raises:
            InjectionError: the batch lacks positions, prompt lengths or vectors, or positions for several vectors.
            WidthError: vectors of another width, or another number of them.
        """
        if batch.injection is not None:
            for number in range(len(self.interventions)):
                self._check(number, batch.injection)

    def _check(self, number: int, injection: Injection) -> None:
        intervention = self.interventions[number]
        need = f"{intervention.mode} at {intervention.where!r} of {intervention.place}"
        self._check_steering(number, injection.steering, need)
        if intervention.where == "positions" and injection.positions is None:
            raise InjectionError(f"a batch without positions for {need}", "positions of each row", _DATA)
        follows = intervention.where in ("prompt", "generated") or len(intervention.decode_factors()) > 1
        if follows and injection.prompt_lengths is None:
            raise InjectionError(f"a batch without prompt lengths for {need}", "the length of each prompt", _DATA)
        if not intervention.takes_vectors:
            return
        if injection.vectors is None:
            raise InjectionError(f"a batch without vectors for {need}", "a vector for each row", _DATA)
        width = intervention.vector_width or self.hidden_size
        if injection.vectors.shape[-1] != width:
            raise WidthError(
                f"vectors of width {injection.vectors.shape[-1]} for {need}", f"{width}",
                "use activations of this model, or mode=project with their vector_width",
            )  # fmt: skip
        if intervention.vectors > 1:
            self._check_several(number, injection, need)

    def _check_several(self, number: int, injection: Injection, need: str) -> None:
        """Rows that take the intervention bring as many vectors, and a position for each."""
        intervention = self.interventions[number]
        shape = None if injection.vectors is None else injection.vectors.shape
        takes = [only is None or number in only for only in injection.only or (None,) * len(injection.lengths)]
        found = [
            (row, len(each), brought)
            for row, each, brought, taken_here in zip(
                injection.rows, injection.positions or (), injection.brought or (0,) * len(takes), takes, strict=True
            )
            if taken_here
        ]
        if found and (shape is None or shape[1:-1] != (intervention.vectors,)):
            wanted = f"{intervention.vectors} for each row"
            raise WidthError(f"vectors of shape {shape and tuple(shape)} for {need}", wanted, _DATA)
        for row, places, brought in found:
            check_brought(intervention, places, brought, f"row {row} of a batch")
            if not intervention.takes(places):
                wanted = f"one for each of {intervention.counts} vectors"
                raise InjectionError(f"{places} positions of a row for {need}", wanted, _DATA)

    def _check_steering(self, number: int, steering: Steering | None, need: str) -> None:
        if steering is None:
            return
        count, several = self.interventions[number].num_strengths, len(self.interventions)
        columns = steering.columns[number] if len(steering.columns) == several else (0, -1)
        if columns is None:
            return
        first, stop = columns
        if not (0 <= first and stop <= steering.values.shape[1] and stop - first == count):
            raise WidthError(
                f"strengths of shape {tuple(steering.values.shape)} with columns {steering.columns} for {need}",
                f"{count} columns of its own, and an entry for each of {several} interventions",
                "predict strengths for the interventions that the model was given",
            )  # fmt: skip

    def _change(self, number: int, injection: Injection, ids_BT: Tensor) -> Change | None:
        intervention, device = self.interventions[number], ids_BT.device
        slot_TB, step_TB = self._placed(number, injection, ids_BT.shape[1])
        slot_N = slot_TB.reshape(-1)
        rows_N = np.flatnonzero(slot_N >= 0)
        if not len(rows_N):
            return None
        factors = np.array(intervention.decode_factors(), dtype=np.float32)
        factor_N = factors[np.minimum(step_TB.reshape(-1), len(factors) - 1)]
        chosen = _chosen(intervention, number, injection, device)
        strengths = [
            intervention.strengths(None if chosen else injection.strengths_of(row, number), injection.training_step)
            for row in range(len(injection.lengths))
            for _ in range(intervention.vectors)
        ]
        vectors = injection.vectors
        if not intervention.takes_vectors or vectors is None:
            vectors = torch.zeros(len(strengths), 0, device=device)
        vectors = taken(vectors, intervention.vectors).flatten(0, -2)
        slots = Slots(
            slot_T=_sent(slot_N, device),
            table_SD=vectors,
            strength_SF=_sent(np.array(strengths, dtype=np.float32), device),
            factor_T=_sent(factor_N, device) if len(factors) > 1 or factors[0] != 1 else None,
        )
        drop = self.dropout.of(number, intervention.vectors, injection)
        return Change(self.formulas[number], slots, _sent(rows_N, device), self.projections.get(number), drop, chosen)

    def _placed(self, number: int, injection: Injection, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Slots and decode steps of the tokens that this rank holds, (T, B) each."""
        prompts = injection.prompt_lengths or injection.lengths
        where, positions = self.interventions[number].where, injection.positions or ()
        vectors = self.interventions[number].vectors
        slot_BT, step_BT = row_slots(where, width, injection.lengths, prompts, positions, vectors)
        for row, only in enumerate(injection.only or ()):
            if only is not None and number not in only:
                slot_BT[row] = UNTOUCHED
        slot_TB, step_TB = slot_BT.T, step_BT.T
        if self.sequence_parallel:
            rank = parallel_state.get_tensor_model_parallel_rank()
            share = width // parallel_state.get_tensor_model_parallel_world_size()
            mine = slice(rank * share, (rank + 1) * share)
            slot_TB, step_TB = slot_TB[mine], step_TB[mine]
        return slot_TB, step_TB


def _chosen(intervention: Intervention, number: int, injection: Injection, device: torch.device) -> Chosen | None:
    steering = injection.steering
    columns = None if steering is None else steering.columns[number]
    if steering is None or columns is None:
        return None
    # Each strength of a request that asks for 1: what the intervention itself and its schedule multiply with.
    factor = intervention.strengths(None, injection.training_step)[0]
    rows_B = torch.tensor(injection.rows, device=device).repeat_interleave(intervention.vectors)
    return Chosen(steering, rows_B, columns, factor)


def check_parts(chunk: Any, parts: Sequence[Microbatch]) -> None:
    """Check microbatches on every stage before the first one runs: a stage that stops later leaves others waiting.

    Args:
        chunk: any of a model's, wrapped for training or not.

    Raises:
        InjectionError, WidthError: as `Sites.check`.
    """
    sites: Sites | None = getattr(getattr(chunk, "module", chunk), "sites", None)
    if sites is not None:
        for part in parts:
            sites.check(part)


def _sent(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)


def intervene(model: Any, interventions: Sequence[Intervention], seed: int = 0, dropout: float = 0.0) -> None:
    """From now on a model applies these interventions to every microbatch that carries their data.

    Called once the model is built and before it is wrapped for training, since `project` adds parameters.

    Args:
        model: a `Decoder`, or the list of a rank's chunks.
        seed: of projections that do not start as the identity, and of their dropout.
        dropout: between a projection's layers, in `train()` mode.

    Raises:
        ConfigError: a block that the model lacks; features that the SAE lacks, or an SAE of another layer.
        WidthError: an SAE of another width.
        MissingFile, CheckpointError, UnsupportedModel: an SAE that cannot be read.
    """
    chunks = chunks_of(model)
    shape, wanted = chunks[0].shape, tuple(interventions)
    device = next(parameter for chunk in chunks for parameter in chunk.parameters()).device
    check_layers(wanted, shape.num_layers)
    # Every rank reads every SAE, so that one that does not fit stops them all.
    formulas = [
        formula_of(each, shape.hidden_size, None if each.sae is None else load_sae(each.sae).to(device))
        for each in wanted
    ]
    for chunk in chunks:
        places: set[int | str] = {block.layer_number - 1 for block in chunk.decoder.layers}
        if chunk.pre_process:
            places.add(EMBEDDING)
        parallel = chunk.config.sequence_parallel
        learned = {
            number: _learned(each, shape.hidden_size, seed + number, device, parallel)
            for number, each in enumerate(wanted)
            if each.mode == "project" and each.layer in places
        }
        if learned:
            chunk.add_module(PROJECTIONS, nn.ModuleDict({str(number): module for number, module in learned.items()}))
        drop = ProjectionDropout(dropout, seed)
        chunk.sites = Sites(wanted, formulas, places, learned, shape.hidden_size, parallel, drop)


def _learned(each: Intervention, width: int, seed: int, device: torch.device, parallel: bool) -> Projection:
    projection = projection_of(each, width, seed).to(device)
    for parameter in projection.parameters():
        # With sequence parallelism a rank sees the touched tokens of its part only, and gradients are summed by this.
        parameter.sequence_parallel = parallel  # type: ignore[attr-defined]
    return projection
