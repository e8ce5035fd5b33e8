"""vLLM at TP 2 in the ranks that train: injection, counts, reloads, and what happens when something is wrong.

Arguments: RESULT SCRATCH. Rank 0 writes what was found.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nla_megatron.config.schema import InterventionConfig, ParallelConfig, RolloutConfig
from nla_megatron.conversion.hf import read_shape
from nla_megatron.errors import NlaError
from nla_megatron.parallel.collectives import barrier
from nla_megatron.parallel.world import initialise
from nla_megatron.rollout.engine import Engine, PromptRequest
from nla_megatron.types import Rollout
from tests.support.tiny import tiny_model

LAYER, POSITION, GROUPS, SAMPLES = 1, 3, 5, 3
PROMPT = (5, 17, 40, 9, 22, 31)
CONFIG = RolloutConfig(tp=2, max_new_tokens=12, max_num_batched_tokens=512, max_num_seqs=16)


def reference_logprobs(directory: Path, rollout: Rollout, vector: np.ndarray, change: Any = None) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if change is not None:
        change(model)
    v = torch.from_numpy(vector)

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        stream = (output[0] if isinstance(output, tuple) else output).clone()
        stream[0, POSITION] += stream[0, POSITION].norm() * v / v.norm()
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    model.model.layers[LAYER].register_forward_hook(hook)
    ids = torch.tensor([*rollout.prompt_ids, *rollout.response_ids])
    with torch.no_grad():
        return torch.log_softmax(model(ids[None]).logits[0], -1)[:-1].gather(-1, ids[1:, None])[
            len(rollout.prompt_ids) - 1 :, 0
        ]


def worst_gap(directory: Path, rollouts: tuple[Rollout, ...], vectors: np.ndarray, change: Any = None) -> float:
    return max(
        float(
            (reference_logprobs(directory, rollout, vectors[rollout.row], change) - torch.tensor(rollout.logprobs))
            .abs()
            .max()
        )
        for rollout in rollouts
    )


def noisy(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def named(call: Any) -> str:
    try:
        call()
    except NlaError as error:
        return f"{type(error).__name__}: {error.found}"
    return "no error"


def main(result: str, scratch: str) -> None:
    from transformers import AutoModelForCausalLM

    directory, world = Path(scratch) / "model", initialise(ParallelConfig(tp=2))
    if world.is_main:
        tiny_model(directory, num_layers=3)
    barrier(world)
    shape = read_shape(directory)
    vectors = np.random.default_rng(3).standard_normal((GROUPS, shape.hidden_size)).astype(np.float32) * 4
    requests = [PromptRequest(group, group, PROMPT, POSITION, 100 + group) for group in range(GROUPS)]
    engine = Engine(str(directory), shape, CONFIG, InterventionConfig("norm_add", LAYER, 1.0), world, 2, 0)

    def sample() -> Any:
        return engine.generate(requests, lambda rows: vectors[list(rows)], SAMPLES)

    first, again = sample(), sample()
    out: dict[str, Any] = {
        "order": [(r.group, r.sample, r.row) for r in first.rollouts],
        "counts": [first.injections.injected, first.injections.expected],
        "repeatable": [r.response_ids for r in first.rollouts] == [r.response_ids for r in again.rollouts],
        "distinct_in_group": len({r.response_ids for r in first.rollouts if r.group == 0}),
        "gap": worst_gap(directory, first.rollouts, vectors),
        "gap_wrong_vectors": worst_gap(directory, first.rollouts, np.roll(vectors, 1, axis=0)),
    }
    scored = engine.score(first.rollouts, [POSITION] * len(first.rollouts), lambda rows: vectors[list(rows)])
    out["score_gap"] = max(
        abs(a - b)
        for r, s in zip(first.rollouts, scored.rollouts, strict=True)
        for a, b in zip(r.logprobs, s.logprobs, strict=True)
    )

    tempered = replace(CONFIG, temperature=0.7)
    engine.config = tempered
    out["score_refused"] = named(
        lambda: engine.score(first.rollouts, [POSITION] * len(first.rollouts), lambda rows: vectors[list(rows)])
    )
    warm = sample()
    out["tempered_gap"] = max(
        float((torch.tensor(r.logprobs) - tempered_logprobs(directory, r, vectors[r.row], 0.7)).abs().max())
        for r in warm.rollouts[:4]
    )
    engine.config = CONFIG

    changed = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    noisy(changed)
    # As the trainer exports them: a tied output layer has no tensor of its own.
    engine.load((name, parameter.detach()) for name, parameter in changed.named_parameters())
    out["gap_after_load"] = worst_gap(directory, sample().rollouts, vectors, noisy)

    # A block that forgets to inject, a token marked that the op does not see, and a rank that holds other samples.
    buffers = engine.injecting.buffers
    mark = engine.injecting._mark
    engine.injecting._mark = lambda: None
    out["not_marked"] = named(sample)
    engine.injecting._mark = lambda: (mark(), buffers.slot_T.fill_(-1))
    out["not_applied"] = named(sample)
    if world.rank == 0:
        engine.injecting._mark = mark
    out["not_applied_on_rank_one"] = named(sample)
    engine.injecting._mark = mark
    make = engine._rollout

    def other_on_rank_one(request: Any, index: int, ids: Any, logprobs: Any) -> Rollout:
        return make(request, index, [*ids[:-1], 7] if world.rank == 1 and request.group == 2 else ids, logprobs)

    engine._rollout = other_on_rank_one
    out["other_rank"] = named(sample)
    engine._rollout = make
    out["fine_again"] = named(sample)
    if world.is_main:
        Path(result).write_text(json.dumps(out))
    barrier(world)
    engine.close()


def tempered_logprobs(directory: Path, rollout: Rollout, vector: np.ndarray, temperature: float) -> torch.Tensor:
    def divide(model: torch.nn.Module) -> None:
        model.lm_head.register_forward_hook(lambda m, i, logits: logits / temperature)

    return reference_logprobs(directory, rollout, vector, divide)


if __name__ == "__main__":
    main(*sys.argv[1:3])
