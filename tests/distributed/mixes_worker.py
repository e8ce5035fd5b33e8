"""Random mixes of requests on a real engine: lengths, vectors, interventions, arrivals, aborts.

Arguments: RESULT SCRATCH.

Before and after every site the whole stream is kept, and each token of it compared with the change that its request
asked for there, made by hand; a token that nobody asked for must come out bit for bit. Then a compiled engine is
compared with the eager one.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nla_megatron.config.schema import ParallelConfig, RolloutConfig
from nla_megatron.conversion.hf import read_shape
from nla_megatron.interventions.schedules import Schedule
from nla_megatron.interventions.spec import Intervention
from nla_megatron.parallel.world import initialise
from nla_megatron.rollout.engine import Engine, PromptRequest
from nla_megatron.rollout.plugin import NAME
from tests.support import hooked
from tests.support.tiny import tiny_model

INTERVENTIONS = (
    Intervention(0, "norm_add"),
    Intervention("embedding", "replace", "prompt", 2.0),
    Intervention(1, "add", "generated", 0.5, Schedule("linear", "decode", 1.0, 0.0, 4)),
    Intervention(1, "norm_add", "all", 0.25),
)
FORMULAS = (hooked.norm_add, hooked.replace, hooked.add, hooked.norm_add)
VECTORS = np.random.default_rng(8).standard_normal((3, 64)).astype(np.float32)
STEM = tuple(int(each) for each in np.random.default_rng(9).integers(5, 590, 56))
# Four blocks of 32 tokens for sequences of one or two: when one grows into its second block, another must go.
BLOCK_BYTES = 32 * 2 * 2 * 2 * 32 * 4
CONFIG = RolloutConfig(
    max_new_tokens=7, max_num_batched_tokens=24, max_num_seqs=4, kv_block_size=32, max_model_len=64,
    cpu_kv_cache_gib=4.5 * BLOCK_BYTES / 2**30,
)  # fmt: skip
COUNTS: Counter[str] = Counter()


@dataclass(frozen=True)
class Arrival:
    """One request of a mix: when it comes, how long it may grow, and when it is given up."""

    request: PromptRequest
    new_tokens: int
    at: int
    abort: int | None


@st.composite
def mixes(draw: Any) -> list[Arrival]:
    arrivals = []
    for number in range(draw(st.integers(1, 6))):
        length = draw(st.integers(1, 56) | st.integers(26, 32))
        only = draw(st.sets(st.integers(0, 3)))
        positions = draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=3, unique=True))
        request = PromptRequest(
            number, draw(st.integers(0, 2)), STEM[:length], positions[0], number, tuple(positions[1:]), tuple(only)
        )
        abort = draw(st.none() | st.integers(0, 8))
        arrivals.append(Arrival(request, draw(st.integers(1, 7)), draw(st.integers(0, 4)), abort))
    return arrivals


def strength(number: int, request: PromptRequest, position: int) -> float | None:
    """Of one token, by hand; None where it is left alone."""
    prompt, marked = len(request.prompt_ids), (request.position, *request.more_positions)
    if request.only is None or number not in request.only:
        return None
    return (
        1.0 if position in marked else None,
        2.0 if position < prompt else None,
        0.5 * max(0.0, 1 - (position - prompt) / 4) if position >= prompt else None,
        0.25,
    )[number]


class Recorder:
    """Checks what each site does to the tokens of each forward pass; `wrong` says where it did something else."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.requests: dict[str, PromptRequest] = {}
        self.wrong: list[str] = []
        for number, site in enumerate(engine.marker.sites):
            site.change = self._checked(number, site.change)  # type: ignore[method-assign]

    def _checked(self, number: int, change: Any) -> Any:
        def checked(hidden_TD: Tensor, residual_TD: Tensor | None) -> None:
            kept = hidden_TD.clone()
            change(hidden_TD, residual_TD)
            rest = torch.zeros_like(kept) if residual_TD is None else residual_TD
            for token, (request, position) in enumerate(self._tokens()):
                wanted = strength(number, request, position)
                if wanted is None:
                    right = torch.equal(hidden_TD[token], kept[token])
                else:
                    vector = torch.from_numpy(VECTORS[request.row])
                    after = FORMULAS[number](kept[token] + rest[token], vector, wanted)
                    right = torch.allclose(hidden_TD[token] + rest[token], after, rtol=1e-5, atol=1e-5)
                    COUNTS["changed"] += 1
                if not right:
                    self.wrong.append(f"intervention {number}, position {position} of {request}")

        return checked

    def _tokens(self) -> list[tuple[PromptRequest, int]]:
        """The request and the absolute position of each token of the batch, from vLLM's own records."""
        runner, tokens = self.engine.runner, []
        batch, starts = runner.input_batch, runner.query_start_loc.np
        for index, name in enumerate(batch.req_ids):
            request = self.requests[runner.requests[name].sampling_params.extra_args[NAME]]
            first = int(batch.num_computed_tokens_cpu[index])
            tokens += [(request, first + offset) for offset in range(int(starts[index + 1] - starts[index]))]
        return tokens


def serve(engine: Engine, recorder: Recorder, mix: list[Arrival]) -> None:
    """Run a mix to its end, and settle its account."""
    from vllm import SamplingParams

    serving, requests = engine.llm.llm_engine, [arrival.request for arrival in mix]
    asked = engine.terms.asked(requests, 1, read, None, 0)
    recorder.wrong.clear()
    recorder.requests = dict(zip(asked, requests, strict=True))
    engine.marker.begin(asked)
    names: dict[int, str] = {}
    step = 0
    while step <= 4 or serving.has_unfinished_requests():
        for number, (key, arrival) in enumerate(zip(asked, mix, strict=True)):
            if arrival.at == step:
                prompt = {"prompt_token_ids": list(arrival.request.prompt_ids), "cache_salt": asked[key].salt}
                params = SamplingParams(
                    max_tokens=arrival.new_tokens,
                    seed=number,
                    ignore_eos=True,
                    detokenize=False,
                    extra_args={NAME: key},
                )
                names[number] = serving.add_request(f"{COUNTS['mixes']}.{number}", prompt, params) or ""
            if arrival.abort is not None and arrival.at + arrival.abort == step:
                serving.abort_request([f"{COUNTS['mixes']}.{number}"])
        serving.step()
        step += 1
        assert step < 300, "the mix does not come to its end"
    reports, wrong = engine.ledger.settle(asked, engine.marker.finish())
    assert recorder.wrong == [], recorder.wrong[:3]
    assert wrong == [], wrong
    assert not engine.marker.live
    COUNTS["mixes"] += 1
    COUNTS["requests"] += len(mix)
    COUNTS["cached"] += sum(any(report.cached) for report in reports)
    COUNTS["preempted"] += sum(report.preemptions for report in reports)
    COUNTS["aborted"] += sum(arrival.abort is not None for arrival in mix)


def random_mixes(engine: Engine) -> None:
    recorder = Recorder(engine)
    check = settings(
        max_examples=200, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # smaller mixes are no easier to read, and take minutes to find
    )  # fmt: skip
    check(given(mixes())(lambda mix: serve(engine, recorder, mix)))()


def gaps_of_compiled(eager: Engine, compiled: Engine) -> dict[str, float]:
    """Largest differences of log-probs: on what the eager engine sampled, and on what the compiled one filtered."""
    requests = [PromptRequest(group, group, STEM[:20], 3, 40 + group) for group in range(3)]
    gaps = {}
    for name, sampler, scorer, temperature in (
        ("compiled", eager, compiled, 1.0),
        ("filtered", compiled, eager, 0.7),
    ):
        for engine in (sampler, scorer):
            engine.config = replace(engine.config, temperature=temperature)
        sampled = sampler.generate(requests, read, 2).rollouts
        scored = scorer.score(sampled, [requests[each.group] for each in sampled], read).rollouts
        gaps[f"gap_of_{name}"] = max(
            abs(a - b)
            for r, s in zip(sampled, scored, strict=True)
            for a, b in zip(r.logprobs, s.logprobs, strict=True)
        )
    return gaps


def read(rows: Sequence[int]) -> np.ndarray:
    return VECTORS[list(rows)]


def main(result: str, scratch: str) -> None:
    directory, world = tiny_model(Path(scratch) / "model", num_layers=2), initialise(ParallelConfig())
    # Both are kept to the end: vLLM gives up its process groups with the first engine that goes.
    engine, compiled = (
        Engine(str(directory), read_shape(directory), config, INTERVENTIONS, world, 2, 0)
        for config in (CONFIG, replace(CONFIG, compiled=True, top_k=20, top_p=0.9))
    )
    out: dict[str, Any] = gaps_of_compiled(engine, compiled)
    out["mode"] = compiled.llm.llm_engine.vllm_config.compilation_config.mode.name
    random_mixes(engine)
    Path(result).write_text(json.dumps(out | COUNTS))
    engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:3])
