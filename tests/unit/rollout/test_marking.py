"""Slots and accounts, driven as vLLM's scheduler drives them; no engine, no model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nla_megatron.interventions.maths import FORMULAS
from nla_megatron.interventions.schedules import Schedule
from nla_megatron.interventions.spec import Intervention
from nla_megatron.rollout.accounting import Asked, Ledger, missing_samples
from nla_megatron.rollout.marking import Marker
from nla_megatron.rollout.plugin import NAME
from nla_megatron.rollout.sites import Site

WIDTH, SLOTS, TOKENS, PROMPT = 4, 2, 16, 5
GENERATED = Intervention(1, "add", "generated", 1.0, Schedule("linear", "decode", 1.0, 0.0, 4))


class Run:
    """A marker with one site, and the batches that a scheduler would make: (request, first token, how many)."""

    def __init__(self, intervention: Intervention):
        self.site = Site(intervention, FORMULAS["add"], TOKENS, SLOTS, WIDTH, torch.device("cpu"))
        self.marker, self.ledger = Marker([self.site], SLOTS), Ledger([intervention])

    def begin(self, *names: str) -> dict[str, Asked]:
        count = self.site.intervention.vectors
        # The i-th of several is filled with i + 1.
        vector = np.repeat(np.arange(1.0, count + 1, dtype=np.float32), WIDTH).reshape(count, WIDTH)
        vectors, positions = (vector if count > 1 else vector[0],), (2, *range(4, 3 + count))
        # "b1" has the first of the positions alone.
        own = {name: positions[: int(name[1:] or count)] for name in names}
        asked = {name: Asked(name, PROMPT, own[name], vectors, ((1.0,),), salt=str(own[name])) for name in names}
        self.marker.begin(asked)
        return asked

    def step(self, *batch: tuple[str, int, int], **changes: Any) -> list[tuple[int, float]]:
        """What the tokens of a batch take: (slot, factor). `new`, `resumed`, `finished`, `preempted` are names."""
        first = {name: start for name, start, _ in batch}
        params = {name: SimpleNamespace(extra_args={NAME: name}) for name in first}
        self.marker.follow(
            SimpleNamespace(
                finished_req_ids=changes.get("finished", ()),
                preempted_req_ids=changes.get("preempted"),
                scheduled_new_reqs=[
                    SimpleNamespace(req_id=name, sampling_params=params[name], num_computed_tokens=first[name])
                    for name in changes.get("new", ())
                ],
                scheduled_cached_reqs=SimpleNamespace(
                    resumed_req_ids=set(changes.get("resumed", ())),
                    req_ids=list(changes.get("resumed", ())),
                    num_computed_tokens=[first[name] for name in changes.get("resumed", ())],
                ),
            )
        )
        counts = np.array([count for _, _, count in batch])
        starts = np.concatenate([[0], np.cumsum(counts)])
        records = SimpleNamespace(
            req_ids=list(first),
            num_computed_tokens_cpu=np.array(list(first.values())),
            num_prompt_tokens=np.full(len(batch), PROMPT),
        )
        self.marker.mark(records, starts[:-1], counts)
        hidden = torch.zeros(int(starts[-1]), WIDTH)
        self.site.change(hidden, torch.zeros_like(hidden))
        slots = self.site.host_slot_T[: len(hidden)].tolist()
        return [(slot, float(row[0])) for slot, row in zip(slots, hidden, strict=True)]

    def settle(self, asked: dict[str, Asked]) -> list[str]:
        return self.ledger.settle(asked, self.marker.finish())[1]


def test_a_marker_takes_its_requests_slot_in_whichever_chunk_it_falls() -> None:
    run = Run(Intervention(1, "add"))
    asked = run.begin("a", "b")
    assert run.step(("a", 0, 2), ("b", 0, 5), new=["a", "b"]) == [(-1, 0)] * 4 + [(1, 1), (-1, 0), (-1, 0)]
    assert run.step(("a", 2, 3), ("b", 5, 1)) == [(0, 1), (-1, 0), (-1, 0), (-1, 0)]
    assert run.settle(asked) == []


def test_a_schedule_follows_the_decode_steps_also_after_a_preemption() -> None:
    run = Run(GENERATED)
    asked = run.begin("a")
    run.step(("a", 0, 5), new=["a"])
    assert [run.step(("a", position, 1))[0][1] for position in (5, 6, 7)] == [1.0, 0.75, 0.5]
    # Begun anew, in pieces, one of which is a single token.
    assert run.step(("a", 0, 6), preempted=["a"], resumed=["a"]) == [(-1, 0)] * 5 + [(0, 1.0)]
    assert run.step(("a", 6, 1)) == [(0, 0.75)]
    assert run.step(("a", 7, 2)) == [(0, 0.5), (0, 0.25)]
    assert run.step(("a", 9, 1)) == [(0, 0.0)]
    assert run.settle(asked) == []


def test_a_slot_is_free_again_when_its_request_ends_or_is_preempted() -> None:
    run = Run(Intervention(1, "add"))
    run.begin("a", "b", "c", "d")
    run.step(("a", 0, 5), ("b", 0, 5), new=["a", "b"])
    run.step(("c", 0, 5), ("b", 5, 1), new=["c"], finished=["a"])
    run.step(("c", 5, 1), ("d", 0, 5), new=["d"], preempted=["b"])
    assert set(run.marker.live) == {"c", "d"}


def test_a_batch_without_marks_clears_those_of_the_one_before() -> None:
    run = Run(Intervention(1, "add"))
    run.begin("a")
    run.step(("a", 0, 5), new=["a"])
    assert run.step(("a", 5, 1)) == [(-1, 0)]
    assert run.site.rows_N is None


@pytest.mark.parametrize("known", [True, False])
def test_a_marker_from_the_cache_counts_only_if_its_salt_was_injected_since_the_cache_was_emptied(known: bool) -> None:
    run = Run(Intervention(1, "add"))
    asked = run.begin("a", "b")
    run.step(("a", 0, 5), new=["a"])
    assert run.settle(asked) == []
    if not known:
        run.ledger.clear()
    asked = run.begin("b")
    run.step(("b", 4, 1), new=["b"])
    wrong = run.settle(asked)
    assert wrong == ([] if known else ["b: cached without it at block 1, position 2 (1 of 1 tokens)"])


def test_a_sample_that_was_not_followed_to_its_end_is_named() -> None:
    run = Run(Intervention(1, "add"))
    asked = run.begin("a", "b")
    run.step(("a", 0, 5), new=["a"])
    periods = run.marker.finish()
    assert missing_samples(asked, periods, {"a": [5]}) == []
    assert missing_samples(asked, periods, {"a": [7]}) == ["a: 1 of 1 samples followed, to tokens [5]"]
    assert missing_samples(asked, periods, {"a": [5], "b": [5]}) == ["b: 0 of 1 samples followed, to tokens []"]


def test_each_marker_takes_its_own_vector_in_whichever_chunk_it_falls() -> None:
    run = Run(Intervention(1, "add", vectors=2))
    asked = run.begin("a", "b")
    none = (-1, 0.0)
    assert run.step(("a", 0, 3), ("b", 0, 5), new=["a", "b"]) == [
        none, none, (0, 1.0), none, none, (2, 1.0), none, (3, 2.0)
    ]  # fmt: skip
    assert run.step(("a", 3, 2), ("b", 5, 1)) == [none, (1, 2.0), none]
    # Begun anew, in the slot that became free.
    assert run.step(("b", 0, 5), preempted=["b"], resumed=["b"]) == [none, none, (2, 1.0), none, (3, 2.0)]
    periods = run.marker.finish()
    assert [(period.marked, period.applied) for period in periods] == [([2], [2])] * 3
    assert run.ledger.settle(asked, periods)[1] == []


def test_one_of_several_markers_that_was_not_changed_is_named() -> None:
    run = Run(Intervention(1, "add", vectors=2))
    asked = run.begin("a")
    send = run.site.send
    run.site.send = lambda rows: send(rows[:1])  # type: ignore[method-assign]
    run.step(("a", 0, 5), new=["a"])
    assert run.settle(asked) == ["a: 1 of 2 marked tokens changed at block 1"]


def test_a_request_with_fewer_markers_than_others_takes_its_last_vectors() -> None:
    run = Run(Intervention(1, "add", vectors=2, fewest=1))
    asked = run.begin("a", "b1")
    none = (-1, 0.0)
    assert run.step(("b1", 0, 5), ("a", 0, 5), new=["b1", "a"]) == [
        none, none, (1, 2.0), none, none, none, none, (2, 1.0), none, (3, 2.0)
    ]  # fmt: skip
    periods = run.marker.finish()
    assert sorted((period.key, period.marked, period.applied) for period in periods) == [
        ("a", [2], [2]), ("b1", [1], [1])
    ]  # fmt: skip
    assert run.ledger.settle(asked, periods)[1] == []
