"""Four ranks train, and their weights go into a running engine, by its log-probs and by what it refuses.

Arguments: RESULT SCRATCH. Rank 0 writes what was found.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from nla_megatron.config.schema import InterventionConfig, ParallelConfig, RolloutConfig
from nla_megatron.conversion.hf import read_shape
from nla_megatron.conversion.live import global_parameters
from nla_megatron.errors import NlaError
from nla_megatron.parallel.collectives import barrier, gather_objects
from nla_megatron.parallel.world import initialise
from nla_megatron.reshard.resharder import Resharder
from nla_megatron.rollout.engine import Engine
from tests.support.reshard_models import tensors, trainer
from tests.support.tiny import tiny_model


def main(result: str, scratch: str) -> None:
    found = in_a_running_engine(Path(scratch))
    # An engine takes the process group down with itself.
    if os.environ["RANK"] == "0":
        Path(result).write_text(json.dumps(found))


def logprobs(engine: Engine) -> list[float]:
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": list(range(start, start + 40))} for start in (5, 200, 431)]
    outputs = engine.llm.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    return [next(iter(step.values())).logprob for output in outputs for step in output.prompt_logprobs[1:]]


def named(call: Any) -> str:
    try:
        call()
    except NlaError as error:
        return type(error).__name__
    return "no error"


@torch.no_grad()
def in_a_running_engine(scratch: Path) -> dict[str, Any]:
    world, directory = initialise(ParallelConfig(tp=2, pp=2)), scratch / "model"
    if world.is_main:
        tiny_model(directory)
    barrier(world)
    shape = read_shape(directory)
    rollout = RolloutConfig(tp=2, max_new_tokens=12, max_num_batched_tokens=512, max_num_seqs=16)
    engine = Engine(str(directory), shape, rollout, InterventionConfig("norm_add", 1, 1.0), world, 2, 0)
    full = {name: tensor * 0.1 for name, tensor in tensors(shape).items()}
    other = {name: tensor * -0.07 for name, tensor in tensors(shape).items()}
    engine.load(iter(full.items()))
    expected = logprobs(engine)
    found: dict[str, Any] = {}
    for layout, options in {"tp2 pp2": {"tp": 2, "pp": 2}, "tp1": {}}.items():
        if layout != "tp2 pp2":
            parallel_state.destroy_model_parallel()
            world = initialise(ParallelConfig(**options))
        model = trainer(shape, full, world)
        resharder = Resharder(model, shape, engine.llm, shape, world)
        engine.load(iter(other.items()))
        found[f"{layout} before"] = logprobs(engine) == expected
        with engine.replacing_weights():
            resharder.load()
        found[layout] = logprobs(engine) == expected
    parameter = next(iter(global_parameters(model).values()))
    parameter[0] += 1.0 if world.rank == 1 else 0.0

    def apart() -> None:
        with engine.replacing_weights():
            for _ in range(10):
                resharder.load()

    found["replicas apart"] = named(apart)
    found["refused after"] = named(lambda: engine._run([(1, 2)], [], None))
    if world.rank == 3:
        parameter[0, 0] = float("nan")
    found["nan"] = named(resharder.load)
    found["other model"] = named(
        lambda: Resharder(model, shape, engine.llm, replace(shape, vocab_size=shape.vocab_size + 1), world)
    )
    everyone = gather_objects(found, world)
    engine.close()
    return {key: sorted({str(one[key]) for one in everyone}) for key in found}


if __name__ == "__main__":
    main(*sys.argv[1:3])
