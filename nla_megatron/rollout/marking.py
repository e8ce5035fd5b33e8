"""Which tokens of a batch take which slot: the host's side of every forward pass.

A request holds a slot from when it is first scheduled until it ends or is preempted. vLLM runs no more requests at once
than there are slots; the others wait in its queue. Tokens that continue a response are marked all at once: the time
this takes does not grow with the requests that have nothing to mark. Legend: R requests of a batch, S slots, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nla_megatron.interventions.placement import Span, mark, touched
from nla_megatron.rollout.accounting import Asked, Period
from nla_megatron.rollout.plugin import NAME
from nla_megatron.rollout.sites import Site


@dataclass(frozen=True)
class Live:
    """A request that holds a slot."""

    slot: int
    asked: Asked
    period: Period


class Marker:
    """Follows vLLM's scheduler and marks the tokens of each batch. `sites` share the slots."""

    def __init__(self, sites: Sequence[Site], slots: int):
        self.sites = tuple(sites)
        self.asked: Mapping[str, Asked] = {}
        self.live: dict[str, Live] = {}
        self._keys: dict[str, str] = {}
        self._free = list(reversed(range(slots)))
        self._batch: list[str] = []
        self._slots_R = np.empty(0, dtype=np.int64)
        self._closed: list[tuple[list[Period], list[torch.Tensor]]] = []
        self._fed_S = np.zeros(slots, dtype=np.int64)
        self._prompt_S = np.zeros(slots, dtype=np.int64)
        self._active_S = np.zeros((len(self.sites), slots), dtype=bool)
        # Of the tokens that continue a response, for each site: the first one, and the one after the last.
        self._first_S = np.zeros((len(self.sites), slots), dtype=np.int64)
        self._stop_S = np.zeros((len(self.sites), slots), dtype=np.int64)

    def begin(self, asked: Mapping[str, Asked]) -> None:
        """Start a batch of requests, by the keys that they carry in `extra_args`."""
        self._release(list(self.live))
        self.asked, self._closed = asked, []
        self._keys.clear()

    def finish(self) -> list[Period]:
        """Everything that happened since `begin`; waits for the device."""
        self._release(list(self.live))
        for periods, counts in self._closed:
            for per_site in (each.tolist() for each in counts):
                for period, applied in zip(periods, per_site, strict=True):
                    period.applied.append(applied)
        for site in self.sites:
            site.clear()
            site.send(np.empty(0, dtype=np.int64))
        return [period for periods, _ in self._closed for period in periods]

    def follow(self, scheduled: Any) -> None:
        """Give and take slots as vLLM's scheduler starts, preempts, resumes and ends requests."""
        self._release([*scheduled.finished_req_ids, *(scheduled.preempted_req_ids or ())])
        admitted = []
        for new in scheduled.scheduled_new_reqs:
            key = ((new.sampling_params and new.sampling_params.extra_args) or {}).get(NAME)
            if key is not None:
                self._keys[new.req_id] = key
                admitted.append(self._admit(new.req_id, new.num_computed_tokens))
        resumed = scheduled.scheduled_cached_reqs
        if resumed.resumed_req_ids:
            for request, cached in zip(resumed.req_ids, resumed.num_computed_tokens, strict=True):
                if request in resumed.resumed_req_ids and request in self._keys:
                    self._release([request])
                    admitted.append(self._admit(request, cached))
        if admitted:
            self._fill(admitted)

    def mark(self, batch: Any, starts_R: np.ndarray, counts_R: np.ndarray) -> None:
        """Mark the tokens of the batch about to run.

        Args:
            batch: vLLM's `InputBatch`.
            starts_R: index of each request's first token in the batch.
            counts_R: how many tokens each has.
        """
        first_R = batch.num_computed_tokens_cpu[: len(counts_R)]
        for site in self.sites:
            site.clear()
        requests, slots_R = batch.req_ids, self._slots_of(batch.req_ids)
        ours = np.flatnonzero(slots_R >= 0)
        self._fed_S[slots_R[ours]] = (first_R + counts_R)[ours]
        decodes = (counts_R == 1) & (first_R >= batch.num_prompt_tokens[: len(counts_R)])
        chunks = ours[~decodes[ours]].tolist()
        continued = ours[decodes[ours]]
        for number, site in enumerate(self.sites):
            rows = [
                row
                for index in chunks
                for row in self._mark_chunk(
                    number, self.live[requests[index]], int(starts_R[index]), int(first_R[index]), int(counts_R[index])
                )
            ]
            marked = np.array(rows, dtype=np.int64)
            if site.follows_decoding and len(continued):
                chosen = continued[self._active_S[number, slots_R[continued]]]
                self._mark_continued(number, site, slots_R[chosen], starts_R[chosen], first_R[chosen])
                marked = np.concatenate([marked, starts_R[chosen].astype(np.int64)])
            site.send(marked)

    def _slots_of(self, requests: list[str]) -> np.ndarray:
        """The slot of each request of the batch, -1 for none: looked up only when the batch has changed."""
        if requests != self._batch:
            self._batch = list(requests)
            holders = (self.live.get(request) for request in requests)
            self._slots_R = np.array([-1 if each is None else each.slot for each in holders], dtype=np.int64)
        return self._slots_R

    def _mark_chunk(self, number: int, live: Live, start: int, first: int, count: int) -> Iterable[int]:
        """Several tokens of one request, prompt or recomputed; the tokens of the batch that were marked."""
        site, asked = self.sites[number], live.asked
        where, vectors = site.intervention.where, site.intervention.vectors
        if asked.strengths[number] is None:
            return
        # What is computed again after a preemption may come in pieces, and one of them be a single token.
        self._end_run(number, live)
        span = Span(first, count, asked.prompt_tokens)
        marked = mark(site.host_slot_T, where, live.slot, start, span, asked.positions, vectors)
        live.period.marked[number] += marked
        for indices in touched(where, span, asked.positions):
            live.period.changed[number].append((first + indices.start, first + indices.stop))
            here = slice(start + indices.start, start + indices.stop)
            if len(site.factors) > 1:
                steps = span.decode_steps()[indices.start : indices.stop]
                site.host_factor_T[here] = site.factors[np.minimum(steps, len(site.factors) - 1)]
            yield from range(here.start, here.stop)

    def _mark_continued(
        self, number: int, site: Site, slots_N: np.ndarray, rows_N: np.ndarray, first_N: np.ndarray
    ) -> None:
        """One token each of many responses."""
        site.host_slot_T[rows_N] = slots_N
        if len(site.factors) > 1:
            steps = np.minimum(first_N - self._prompt_S[slots_N], len(site.factors) - 1)
            site.host_factor_T[rows_N] = site.factors[steps]
        starting = slots_N[self._stop_S[number, slots_N] == 0]
        self._first_S[number, starting] = first_N[self._stop_S[number, slots_N] == 0]
        self._stop_S[number, slots_N] = first_N + 1

    def _end_run(self, number: int, live: Live) -> None:
        """Enter the tokens that were marked one by one, which follow each other without a gap."""
        first, stop = int(self._first_S[number, live.slot]), int(self._stop_S[number, live.slot])
        if stop:
            live.period.changed[number].append((first, stop))
            live.period.marked[number] += stop - first
            self._stop_S[number, live.slot] = 0

    def _admit(self, request: str, cached: int) -> Live:
        key, slot = self._keys[request], self._free.pop()
        count = len(self.sites)
        period = Period(key, request, cached, cached, [[] for _ in range(count)], [0] * count)
        self._batch = []
        self.live[request] = live = Live(slot, self.asked[key], period)
        self._fed_S[slot], self._prompt_S[slot] = cached, live.asked.prompt_tokens
        self._first_S[:, slot] = self._stop_S[:, slot] = 0
        self._active_S[:, slot] = [each is not None for each in live.asked.strengths]
        return live

    def _fill(self, admitted: list[Live]) -> None:
        slots = [live.slot for live in admitted]
        for number, site in enumerate(self.sites):
            nothing = (0.0,) * site.intervention.num_strengths
            strengths = torch.tensor([live.asked.strengths[number] or nothing for live in admitted])
            site.fill(slots, [live.asked.vectors[number] for live in admitted], strengths)

    def _release(self, requests: Iterable[str]) -> None:
        leaving = [self.live.pop(request) for request in requests if request in self.live]
        if not leaving:
            return
        self._batch = []
        for live in leaving:
            live.period.fed = int(self._fed_S[live.slot])
            for number in range(len(self.sites)):
                self._end_run(number, live)
        slots = [live.slot for live in leaving]
        self._closed.append(([live.period for live in leaving], [site.take_applied(slots) for site in self.sites]))
        self._free.extend(slots)
