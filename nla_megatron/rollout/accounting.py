"""What was asked of the sampler's interventions, what was done, and whether the two agree.

A request may be served in several periods, because a preempted one begins anew. In each of them every token that an
intervention touches was either changed, or its block came out of the prefix cache; and then tokens of the same salt
must have been changed since the cache was last emptied.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from nla_megatron.errors import InjectionError, RolloutError
from nla_megatron.interventions.placement import Span, touched
from nla_megatron.interventions.spec import Intervention
from nla_megatron.types import InjectionCount, Rollout, RolloutBatch

_CACHED = "cached without it"


@dataclass(frozen=True)
class Asked:
    """The interventions of one request, in the order of the engine's.

    `prompt_tokens`: where generated tokens begin. `positions`: absolute, for interventions at "positions". `vectors`:
    fp32 (D,) for each intervention, or (K, D) where it takes several, after any projection; None where it takes none.
    `strengths`: F of each
    intervention, None where it leaves this request alone. `samples`: responses that share all this.
    """

    name: str
    prompt_tokens: int
    positions: tuple[int, ...]
    vectors: tuple[np.ndarray | None, ...]
    strengths: tuple[tuple[float, ...] | None, ...]
    salt: str
    samples: int = 1


def salt_of(
    interventions: Sequence[Intervention],
    vectors: Sequence[np.ndarray | None],
    strengths: Sequence[Sequence[float] | None],
    positions: Sequence[int],
    prompt_tokens: int,
) -> str:
    """What a cached block depends on besides its tokens: equal for equal content, whoever brings it."""
    place = {
        "interventions": _digest(tuple(interventions)),
        "strengths": [each if each is None else list(each) for each in strengths],
        "positions": list(positions),
        # Where the prompt ends is nothing to a marker in it, so that longer prompts share it.
        "prompt_tokens": None if all(_ends_in_prompt(each) for each in interventions) else prompt_tokens,
    }
    digest = hashlib.sha256(json.dumps(place, sort_keys=True).encode())
    for vector_D in vectors:
        digest.update(b"none" if vector_D is None else np.ascontiguousarray(vector_D, dtype=np.float32).tobytes())
    return digest.hexdigest()


@cache
def _digest(interventions: tuple[Intervention, ...]) -> str:
    values = json.dumps([each.to_dict() for each in interventions], sort_keys=True)
    return hashlib.sha256(values.encode()).hexdigest()


def _ends_in_prompt(intervention: Intervention) -> bool:
    return intervention.where == "positions" or (
        intervention.where == "all" and len(intervention.decode_factors()) == 1
    )


@dataclass
class Period:
    """One stay of a request in the running batch.

    `cached`: tokens at its start that came out of the cache. `fed`: tokens of the sequence whose keys and values exist
    at its end. For each intervention: `changed`, spans [start, stop) of absolute positions that were marked; `marked`
    and `applied`, how many tokens the host marked and the device changed.
    """

    key: str
    request: str
    cached: int
    fed: int = 0
    changed: list[list[tuple[int, int]]] = field(default_factory=list)
    marked: list[int] = field(default_factory=list)
    applied: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """What happened to one sample's tokens: spans [start, stop) for each intervention, by where they came from."""

    name: str
    places: tuple[str, ...]
    computed: tuple[tuple[tuple[int, int], ...], ...]
    cached: tuple[tuple[tuple[int, int], ...], ...]
    preemptions: int


class Ledger:
    """Which tokens of each salt were changed since the cache was last emptied."""

    def __init__(self, interventions: Sequence[Intervention]):
        self.interventions = tuple(interventions)
        self._seen: dict[str, list[set[int]]] = {}

    def clear(self) -> None:
        """The cache was emptied: nothing of before counts."""
        self._seen.clear()

    def settle(self, asked: Mapping[str, Asked], periods: Iterable[Period]) -> tuple[list[Report], list[str]]:
        """The account of a batch: a report per sample, and a line for each that did not get what it asked for."""
        by_request: dict[str, list[Period]] = {}
        for period in periods:
            by_request.setdefault(period.request, []).append(period)
            if period.marked == period.applied:
                self._remember(asked[period.key].salt, period)
        reports: list[Report] = []
        wrong: list[str] = []
        consequences: list[str] = []
        for stays in by_request.values():
            wanted = asked[stays[0].key]
            problems = [problem for period in stays for problem in self._problems(wanted, period)]
            # What others find in the cache is told after what went wrong when it was computed.
            told = consequences if problems and problems[0].startswith(_CACHED) else wrong
            told += [f"{wanted.name}: {problem}" for problem in problems[:1]]
            reports.append(self._report(wanted, stays))
        return reports, wrong + consequences

    def _remember(self, salt: str, period: Period) -> None:
        seen = self._seen.setdefault(salt, [set() for _ in self.interventions])
        for positions, spans in zip(seen, period.changed, strict=True):
            positions.update(position for start, stop in spans for position in range(start, stop))

    def _problems(self, asked: Asked, period: Period) -> Iterable[str]:
        seen = self._seen.get(asked.salt)
        for index, intervention in enumerate(self.interventions):
            if period.marked[index] != period.applied[index]:
                yield f"{period.applied[index]} of {period.marked[index]} marked tokens changed at {intervention.place}"
            needed = self._wanted(index, asked, period.fed)
            changed = {position for start, stop in period.changed[index] for position in range(start, stop)}
            known = seen[index] if seen is not None else set()
            unseen = {position for position in needed - changed if position >= period.cached or position not in known}
            if unseen:
                source = _CACHED if min(unseen) < period.cached else "not marked"
                counts = f"{len(unseen)} of {len(needed)} tokens"
                yield f"{source} at {intervention.place}, position {min(unseen)} ({counts})"
            if extra := changed - needed:
                yield f"position {min(extra)} changed at {intervention.place}, which nobody asked for"

    def _wanted(self, index: int, asked: Asked, fed: int) -> set[int]:
        """The tokens among the first `fed` that an intervention touches."""
        if asked.strengths[index] is None:
            return set()
        span = Span(0, fed, asked.prompt_tokens)
        spans = touched(self.interventions[index].where, span, asked.positions)
        return {position for indices in spans for position in indices}

    def _report(self, asked: Asked, stays: Sequence[Period]) -> Report:
        last, computed, cached = stays[-1], [], []
        for index in range(len(self.interventions)):
            computed.append(tuple(last.changed[index]))
            cached.append(_spans(self._wanted(index, asked, last.cached)))
        places = tuple(each.place for each in self.interventions)
        return Report(asked.name, places, tuple(computed), tuple(cached), len(stays) - 1)


def changed(reports: Iterable[Report]) -> int:
    """How many tokens the interventions changed, with those that the cache had kept as changed before."""
    return sum(
        stop - start for report in reports for spans in (*report.computed, *report.cached) for start, stop in spans
    )


def missing_samples(asked: Mapping[str, Asked], periods: Sequence[Period], fed: Mapping[str, list[int]]) -> list[str]:
    """A line for each request whose samples were not all followed to their ends.

    Args:
        fed: for each request the tokens of every sample that went through the model, in any order: all of its
            sequence but the last one. An engine that schedules ahead may have fed one more.
    """
    last = {period.request: period for period in periods}
    followed: dict[str, list[int]] = {}
    for period in last.values():
        followed.setdefault(period.key, []).append(period.fed)
    wrong = []
    for key, expected in fed.items():
        found = sorted(followed.get(key, []))
        if len(found) != len(expected) or any(
            not want <= got <= want + 1 for want, got in zip(sorted(expected), found, strict=True)
        ):
            wrong.append(f"{asked[key].name}: {len(found)} of {len(expected)} samples followed, to tokens {found}")
    return wrong


def agreed(everyone: Sequence[tuple[str, list[str], list[Rollout] | None]], tp: int, expected: int) -> RolloutBatch:
    """All replicas' rollouts, in the order of groups and samples.

    Args:
        everyone: of each rank a digest of its rollouts, a line for each request that went wrong, and the rollouts
            (those of each replica's first rank are taken).

    Raises:
        InjectionError: a request went wrong.
        RolloutError: ranks of a replica with other rollouts than its first, or another number of them in all.
    """
    rollouts: list[Rollout] = []
    for rank, (digest, problems, sent) in enumerate(everyone):
        first = rank - rank % tp
        if problems:
            raise InjectionError(
                f"{len(problems)} of {expected} requests on rank {rank} did not get what they asked for; "
                f"the first, {problems[0]}", "every token that a request names changed, and no other",
                "this is a defect of the rollout engine: report it",
            )  # fmt: skip
        if digest != everyone[first][0]:
            raise RolloutError(
                f"rank {rank} holds other rollouts than rank {first} of its replica",
                "the same samples on all ranks of a replica", "check that all ranks run the same code and seeds",
            )  # fmt: skip
        rollouts += sent or []
    if len(rollouts) != expected:
        raise RolloutError(f"{len(rollouts)} rollouts", f"{expected}", "this is a defect of the engine: report it")
    rollouts.sort(key=lambda rollout: (rollout.group, rollout.sample))
    return RolloutBatch(tuple(rollouts), InjectionCount(expected, expected))


def _spans(positions: set[int]) -> tuple[tuple[int, int], ...]:
    spans: list[tuple[int, int]] = []
    for position in sorted(positions):
        if spans and spans[-1][1] == position:
            spans[-1] = (spans[-1][0], position + 1)
        else:
            spans.append((position, position + 1))
    return tuple(spans)
