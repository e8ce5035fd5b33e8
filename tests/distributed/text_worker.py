"""A text task on vLLM without interventions, in the ranks that train.

Arguments: RESULT SCRATCH TP. Rank 0 writes what was found. At TP 1 each rank is a replica of its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nla_megatron.config.schema import ParallelConfig, RolloutConfig, TaskConfig
from nla_megatron.conversion.hf import read_shape
from nla_megatron.parallel.collectives import barrier
from nla_megatron.parallel.world import initialise
from nla_megatron.rollout.engine import Engine
from nla_megatron.tasks.text import Data, open_task
from nla_megatron.types import Rollout
from tests.support.hooked import Hooked
from tests.support.tiny import tiny_model

ROWS, SAMPLES, TEMPERATURE = (5, 2, 9, 0), 2, 0.7


def no_vectors(rows: Sequence[int]) -> np.ndarray:
    raise AssertionError(f"vectors of rows {rows} asked for")


def main(result: str, scratch: str, tp: str) -> None:
    world = initialise(ParallelConfig(tp=int(tp)))
    directory = Path(scratch) / f"model{tp}"
    if world.is_main:
        tiny_model(directory)
    barrier(world)
    config = RolloutConfig(tp=int(tp), max_new_tokens=12, temperature=TEMPERATURE, cpu_kv_cache_gib=0.05)
    out: dict[str, Any] = {}
    task = open_task(TaskConfig("lexical"), Data(), str(directory), 0)
    assert task is not None
    engine = Engine(
        str(directory), read_shape(directory), config, (), world, task.tokenizer.end_ids, 0
    )  # fmt: skip
    requests = task.requests(ROWS, 0, 3)
    batch = engine.generate(requests, no_vectors, SAMPLES)
    out["order"] = [(r.group, r.sample, r.row) for r in batch.rollouts]
    out["prompts"] = all(r.prompt_ids == task.prompt_ids(r.row) for r in batch.rollouts)
    out["injections"] = [batch.injections.injected, batch.injections.expected]
    again = engine.generate(requests, no_vectors, SAMPLES)
    out["repeatable"] = [r.response_ids for r in again.rollouts] == [r.response_ids for r in batch.rollouts]
    out["distinct"] = len({r.response_ids for r in batch.rollouts})
    reference = Hooked(directory)

    def gap(rollouts: Sequence[Rollout], temperature: float) -> float:
        return max(
            float(
                (reference.logprobs(r.prompt_ids, r.response_ids, [], temperature) - torch.tensor(r.logprobs))
                .abs()
                .max()
            )  # fmt: skip
            for r in rollouts
        )

    out["gap"] = gap(batch.rollouts, TEMPERATURE)
    out["gap_at_another_temperature"] = gap(batch.rollouts, 1.0)
    scored = engine.score(batch.rollouts, [requests[each.group] for each in batch.rollouts], no_vectors)
    out["score_gap"] = gap(scored.rollouts, TEMPERATURE)
    measured = task.measure(batch.rollouts)
    out["words"] = measured.values["words"].tolist()
    out["texts"] = list(measured.texts)
    if world.is_main:
        Path(result).write_text(json.dumps(out))
    barrier(world)
    engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:4])
