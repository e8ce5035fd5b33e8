"""Ranks 0 and 1 train, ranks 2 and 3 sample, in one process group. Arguments: RESULT SCRATCH."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from nla_megatron.config.schema import ParallelConfig, RolloutConfig
from nla_megatron.conversion.hf import read_shape
from nla_megatron.interventions.spec import Intervention
from nla_megatron.parallel.collectives import barrier, gather_objects
from nla_megatron.parallel.world import initialise, part_of
from nla_megatron.reshard.megatron_side import TrainLayout
from nla_megatron.reshard.resharder import Resharder
from nla_megatron.rollout.engine import Engine
from nla_megatron.rollout.start import stand_by
from tests.distributed.reshard_engine_worker import logprobs
from tests.support.reshard_models import tensors, trainer
from tests.support.tiny import tiny_model

TRAINERS, SAMPLERS = range(2), range(2, 4)


def main(result: str, scratch: str) -> None:
    world, directory = initialise(ParallelConfig(tp=2)), Path(scratch) / "model"
    if world.is_main:
        tiny_model(directory)
    barrier(world)
    shape = read_shape(directory)
    full = {name: tensor * 0.1 for name, tensor in tensors(shape).items()}
    other = {name: tensor * -0.07 for name, tensor in tensors(shape).items()}
    part = part_of(world, (TRAINERS, SAMPLERS))
    config = RolloutConfig(tp=2, max_new_tokens=12, max_num_batched_tokens=512, max_num_seqs=16, cpu_kv_cache_gib=0.1)
    engine, found = None, dict[str, Any]()
    if world.rank in SAMPLERS:
        engine = Engine(str(directory), shape, config, Intervention(1), part, 2, 0)
        engine.load(iter(full.items()))
        expected = logprobs(engine)
        engine.load(iter(other.items()))
        found["before"] = logprobs(engine) == expected
    else:
        stand_by(str(directory), shape, config, part)
    model = trainer(shape, full, world) if world.rank in TRAINERS else []
    resharder = Resharder(
        model, shape, engine and engine.llm, shape, world, layout=TrainLayout(tp=2, etp=2), samplers=SAMPLERS
    )
    if engine is None:
        resharder.load()
    else:
        with engine.replacing_weights():
            resharder.load()
        found["after"] = logprobs(engine) == expected
    plan = resharder.transfer.plan
    everyone = gather_objects((found, plan.bytes_sent, plan.bytes_needed, plan.bytes_local), world)
    if world.is_main:
        Path(result).write_text(json.dumps(everyone))
    barrier(world)
    if engine is not None:
        engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:3])
