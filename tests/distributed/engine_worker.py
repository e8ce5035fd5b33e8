"""vLLM in the ranks that train, under stress: every mode, cut prompts, preemptions, a small cache, wrong input.

Arguments: RESULT SCRATCH TP. Rank 0 writes what was found. At TP 1 each rank is a replica of its own.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nla_megatron.config.schema import ParallelConfig, RolloutConfig
from nla_megatron.conversion.hf import read_shape
from nla_megatron.interventions.checks import Marker
from nla_megatron.interventions.schedules import Schedule
from nla_megatron.interventions.spec import Intervention
from nla_megatron.parallel.collectives import barrier, gather_objects
from nla_megatron.parallel.world import initialise
from nla_megatron.rollout.engine import Engine, PromptRequest
from nla_megatron.types import Rollout, RolloutBatch
from tests.support import hooked
from tests.support.refusals import named
from tests.support.tiny import tiny_model

MARKER, LEFT, RIGHT, POSITION, SECOND, SAMPLES = 40, 22, 31, 4, 27, 2
EOS = 2
CHOSEN, MAX_ACTS = (3, 7), (1.5, 0.5)
# Prompts of 34 tokens and more in batches of at most 32, and a cache that holds about half of 6 sequences.
CONFIG = RolloutConfig(
    max_new_tokens=28, max_num_batched_tokens=32, max_num_seqs=6, kv_block_size=32, max_model_len=128
)
ONLY = (None, *((number,) for number in range(8)), (0, 2, 5), (), (8, 9))


def interventions(sae: Path) -> tuple[Intervention, ...]:
    steering: dict[str, Any] = {"sae": str(sae)}
    return (
        Intervention(1, "norm_add"),
        Intervention("embedding", "replace", strength=3.0),
        Intervention(0, "add", "generated", 0.5, Schedule("linear", "decode", 1.0, -1.0, 8)),
        Intervention(2, "project", strength=0.7),
        Intervention(1, "features", "all", features=CHOSEN, max_acts=MAX_ACTS, **steering),
        Intervention(0, "clamp", "prompt", features=(5,), max_acts=(2.0,), **steering),
        Intervention(2, "global", "generated", **steering),
        Intervention(0, "norm_add", "all", 0.3, Schedule("cosine", "decode", 1.0, 0.5, 12)),
        Intervention(0, "norm_add", vectors=2),
        Intervention(2, "project", strength=0.7, vectors=2),
    )


def by_hand(request: PromptRequest, pair: torch.Tensor, sae: hooked.PlainSae, w: torch.Tensor) -> list[hooked.Change]:
    """The same ten, without the package: which token, how strongly, by what formula.

    All but the last two, of which each marker has its own vector, take the row's own one, the second of the `pair`.
    """
    prompt, v, places = len(request.prompt_ids), pair[1], (request.position, *request.more_positions)

    def at_marker(s: float) -> Callable[[int], float | None]:
        return lambda t: s if t in places else None

    def only_at(place: int, s: float) -> Callable[[int], float | None]:
        return lambda t: s if t == place else None

    def cosine(t: int) -> float:
        done = min(max(t - prompt, 0), 12) / 12
        return 0.3 * (1.0 - 0.5 * (1 - math.cos(math.pi * done)) / 2)

    every = [
        hooked.Change(1, hooked.norm_add, v, at_marker(1.0)),
        hooked.Change("embedding", hooked.replace, v, at_marker(3.0)),
        hooked.Change(0, hooked.add, v, lambda t: None if t < prompt else 0.5 * (1 - 2 * min(t - prompt, 8) / 8)),
        hooked.Change(2, hooked.norm_add, w @ v + 0.25, at_marker(0.7)),
        hooked.Change(1, sae.features(CHOSEN, MAX_ACTS), v, lambda t: 1.0),
        hooked.Change(0, sae.clamp(5, 2.0), v, lambda t: 1.0 if t < prompt else None),
        hooked.Change(2, sae.scaled, v, lambda t: None if t < prompt else 1.0 if request.strengths is None else 1.5),
        hooked.Change(0, hooked.norm_add, v, cosine),
    ]
    numbered = list(enumerate(every))
    for place, each in zip((POSITION, SECOND), pair, strict=True):
        numbered.append((8, hooked.Change(0, hooked.norm_add, each, only_at(place, 1.0))))
        numbered.append((9, hooked.Change(2, hooked.norm_add, w @ each + 0.25, only_at(place, 0.7))))
    # Those of one layer in the engine's order: a later hook of transformers sees what an earlier one returned.
    return [change for number, change in numbered if request.only is None or number in request.only]


class Bench:
    """The engine with everything that its answers are compared with."""

    def __init__(self, scratch: Path, tp: int):
        self.world = initialise(ParallelConfig(tp=tp))
        self.directory = scratch / f"model{tp}"
        if self.world.is_main:
            tiny_model(self.directory, num_layers=3)
            hooked.write_sae(scratch / f"sae{tp}", read_shape(self.directory).hidden_size)
        barrier(self.world)
        shape = read_shape(self.directory)
        from safetensors.torch import load_file

        self.sae = hooked.PlainSae(load_file(scratch / f"sae{tp}" / "sae_weights.safetensors"))
        rng = np.random.default_rng(3)
        own = rng.standard_normal((len(ONLY), shape.hidden_size)).astype(np.float32) * 4
        self.w = torch.from_numpy(rng.standard_normal((shape.hidden_size,) * 2).astype(np.float32))
        prompt = [int(each) for each in rng.integers(5, 590, 30)]
        for position in (POSITION, SECOND):
            prompt[position - 1 : position + 2] = [LEFT, MARKER, RIGHT]
        before = rng.standard_normal(own.shape).astype(np.float32) * 4
        self.vectors = np.stack([before, own], axis=1)
        # Prompts of several lengths that share their first block.
        self.requests = [
            PromptRequest(
                group, group, (*prompt, *(int(each) for each in rng.integers(5, 590, 4 + group))), POSITION,
                100 + 10 * group, (SECOND,) if only in (None, (8, 9)) else (), only=only,
                strengths=(None,) * 6 + ((1.5,), None, None, None) if only == (6,) else None,
            )
            for group, only in enumerate(ONLY)
        ]  # fmt: skip
        # Twelve blocks of 32 tokens: six sequences want up to eighteen.
        block = 32 * 3 * 2 * (shape.num_kv_heads // tp) * shape.head_dim * 4
        self.engine = Engine(
            str(self.directory), shape, replace(CONFIG, tp=tp, cpu_kv_cache_gib=12.5 * block / 2**30),
            interventions(scratch / f"sae{tp}"), self.world, EOS, 0, marker=Marker(MARKER, LEFT, RIGHT),
            project=lambda number, raw: raw @ self.w.numpy().T + 0.25,
        )  # fmt: skip
        self.hooked = hooked.Hooked(self.directory)

    def read(self, rows: Sequence[int]) -> np.ndarray:
        return self.vectors[list(rows)]

    def sample(self, requests: Sequence[PromptRequest] | None = None, samples: int = SAMPLES) -> tuple[Rollout, ...]:
        return self.engine.generate(requests or self.requests, self.read, samples).rollouts

    def gap(
        self, rollouts: Sequence[Rollout], temperature: float = 1.0, wrong: int = 0, swapped: bool = False
    ) -> float:
        """Largest difference of log-probs; `wrong` takes another row's vectors, `swapped` the other one's place."""
        worst = 0.0
        for rollout in rollouts:
            request = self.requests[rollout.group]
            pair = torch.from_numpy(self.vectors[(rollout.row + wrong) % len(ONLY)])
            changes = by_hand(request, pair.flip(0) if swapped else pair, self.sae, self.w)
            want = self.hooked.logprobs(rollout.prompt_ids, rollout.response_ids, changes, temperature)
            worst = max(worst, float((want - torch.tensor(rollout.logprobs)).abs().max()))
        return worst


def faults(bench: Bench) -> dict[str, str]:
    """What is refused before anything runs, and what stops the step after it ran."""
    engine, first = bench.engine, bench.requests[1]
    moved = replace(first, position=POSITION + 1)
    # One for each replica: what only one of them sees ends its rank, and the launcher the others.
    two = [first, replace(first, group=2)]
    out = {
        "outside": named(lambda: bench.sample([replace(first, position=99)])),
        "not_marker": named(lambda: bench.sample([moved])),
        "no_position": named(lambda: bench.sample([replace(first, position=None)])),
        "neighbour": named(
            lambda: bench.sample([replace(first, prompt_ids=(*first.prompt_ids[:5], 7, *first.prompt_ids[6:]))])
        ),
        "too_long": named(lambda: bench.sample([replace(first, prompt_ids=first.prompt_ids + (9,) * 80)])),
        "greedy_group": named(lambda: bench.sample([replace(first, greedy=True)])),
        "width": named(lambda: engine.generate(two, lambda rows: np.ones((len(rows), 7), np.float32), 1)),
        "nan": named(lambda: engine.generate(two, lambda rows: np.full((len(rows), 64), np.nan, np.float32), 1)),
        "one_position": named(lambda: bench.sample([replace(bench.requests[-1], more_positions=())])),
        "one_vector": named(lambda: engine.generate(two, lambda rows: bench.read(rows)[:, 1], 1)),
        "zero": named(lambda: engine.generate(two, lambda rows: np.zeros((len(rows), 64), np.float32), 1)),
        "unknown_intervention": named(lambda: bench.sample([replace(first, only=(10,))])),
    }
    site, rank = engine.marker.sites[0], bench.world.rank
    engine.forget()
    send = site.send
    site.send = lambda rows: send(rows[:0])  # type: ignore[method-assign]  # marked, and then not told
    out["not_applied"] = named(lambda: bench.sample(two))
    if rank == 0:
        site.send = send  # type: ignore[method-assign]
    out["not_applied_on_rank_one"] = named(lambda: bench.sample(two))
    site.send = send  # type: ignore[method-assign]
    mark_chunk = engine.marker._mark_chunk
    engine.marker._mark_chunk = lambda *args: ()  # type: ignore[method-assign]
    out["not_marked"] = named(lambda: bench.sample(two))
    engine.marker._mark_chunk = mark_chunk  # type: ignore[method-assign]
    exchange = engine._exchange

    def other_on_rank_one(mine: list[Rollout], *rest: Any, **more: Any) -> RolloutBatch:
        other = [replace(each, response_ids=(*each.response_ids[:-1], 7)) for each in mine if each.group == 2]
        kept = [each for each in mine if each.group != 2]
        return exchange([*kept, *other] if rank == 1 else mine, *rest, **more)

    engine._exchange = other_on_rank_one  # type: ignore[method-assign]
    out["other_rank"] = named(lambda: bench.sample(bench.requests[:3]))
    engine._exchange = exchange  # type: ignore[method-assign]
    out["fine_again"] = named(lambda: bench.sample(bench.requests[:3]))
    return out


def cache(bench: Bench) -> dict[str, Any]:
    """The same prompt with one vector and with another; a cache that was filled without the vector."""
    engine = bench.engine
    one = replace(bench.requests[1], samples=1)
    other = replace(one, group=2, row=2)
    engine.forget()
    bench.sample([one])
    bench.sample([one, other])
    reports = gather_objects([(r.name, r.computed[0], r.cached[0]) for r in engine.reports], bench.world)
    flat = sorted({tuple(map(str, each)) for rank in reports for each in rank})
    engine.ledger.clear()  # as if the blocks were of a time that nobody has accounted for
    unknown = named(lambda: bench.sample([one]))
    again = named(lambda: bench.sample([one]))
    return {"cache_reports": flat, "cache_unknown": unknown, "cache_again": again}


def main(result: str, scratch: str, tp: str) -> None:
    from transformers import AutoModelForCausalLM

    bench = Bench(Path(scratch), int(tp))
    engine, world = bench.engine, bench.world
    first = bench.sample()
    reports = [report for rank in gather_objects(engine.reports, world) for report in rank]
    out: dict[str, Any] = {
        "order": [(r.group, r.sample, r.row) for r in first],
        "gap": bench.gap(first),
        "gap_swapped_vectors": bench.gap([r for r in first if r.group == len(ONLY) - 1], swapped=True),
        "gap_wrong_vectors": bench.gap([r for r in first if r.group in (1, 2, 3)], wrong=1),
        "cut": sum(len(report.computed[5]) > 1 for report in reports),
        "preempted": sum(report.preemptions for report in reports),
        "from_cache": sum(any(report.cached) for report in reports),
        "replicas": [len(each) for each in gather_objects(engine.reports, world)],
    }
    again = bench.sample()
    out["repeatable"] = [r.response_ids for r in first] == [r.response_ids for r in again]
    out["distinct"] = len({r.response_ids for r in first if r.group == 1})
    short = [replace(r, response_ids=r.response_ids[:20], logprobs=r.logprobs[:20]) for r in first if r.group == 0]
    scored = engine.score(short, [bench.requests[0]] * len(short), bench.read).rollouts
    out["score_gap"] = max(
        abs(a - b) for r, s in zip(short, scored, strict=True) for a, b in zip(r.logprobs, s.logprobs, strict=True)
    )
    out["greedy"] = bench.gap(bench.sample([replace(r, greedy=True) for r in bench.requests[:3]], 1))
    out["plain"] = bench.gap(bench.sample([replace(bench.requests[ONLY.index(())], position=None)]))
    engine.config = replace(engine.config, temperature=0.7)
    tempered = bench.sample([replace(r, greedy=r.group == 3) for r in bench.requests[:4]], 1)
    out["tempered_gap"] = bench.gap([r for r in tempered if r.group != 3], 0.7)
    out["tempered_greedy_gap"] = bench.gap([r for r in tempered if r.group == 3])
    whole = [r for r in tempered if r.group == 0]
    rescored = engine.score(whole, [bench.requests[0]] * len(whole), bench.read).rollouts
    out["tempered_score_gap"] = bench.gap(rescored, 0.7)
    out["greedy_after_score"] = bench.gap(bench.sample([replace(r, greedy=True) for r in bench.requests[:3]], 1))
    engine.config = replace(engine.config, temperature=1.0)
    out |= cache(bench)
    changed = AutoModelForCausalLM.from_pretrained(bench.directory, dtype=torch.float32)
    noisy(changed)
    # As the trainer exports them: a tied output layer has no tensor of its own.
    engine.load((name, parameter.detach()) for name, parameter in changed.named_parameters())
    noisy(bench.hooked.model)
    out["gap_after_load"] = bench.gap(bench.sample(bench.requests[:4]))
    out["slept"] = engine.sleep()
    engine.wake()
    out |= faults(bench)
    if world.is_main:
        Path(result).write_text(json.dumps(out))
    barrier(world)
    engine.close()


def noisy(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


if __name__ == "__main__":
    main(*sys.argv[1:4])
