"""Two ranks of one replica, of which the second one's model fails in the middle of a batch. Argument: SCRATCH."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from nla_megatron.config.schema import ParallelConfig, RolloutConfig
from nla_megatron.conversion.hf import read_shape
from nla_megatron.interventions.spec import Intervention
from nla_megatron.parallel.collectives import barrier
from nla_megatron.parallel.world import initialise
from nla_megatron.rollout.engine import Engine, PromptRequest
from tests.support.tiny import tiny_model


def main(scratch: str) -> None:
    directory, world = Path(scratch) / "model", initialise(ParallelConfig(tp=2))
    if world.is_main:
        tiny_model(directory, num_layers=2)
    barrier(world)
    config = RolloutConfig(tp=2, max_new_tokens=4, max_num_seqs=2, max_model_len=64, cpu_kv_cache_gib=0.1)
    engine = Engine(str(directory), read_shape(directory), config, Intervention(0), world, 2, 0)

    def fails(*streams: Any) -> None:
        raise RuntimeError("the device of rank 1 is gone")

    if world.rank == 1:
        engine.marker.sites[0].change = fails  # type: ignore[method-assign]
    engine.generate([PromptRequest(0, 0, (5, 6, 7), 1, 0)], lambda rows: np.ones((len(rows), 64), np.float32), 1)
    print("past the failure")


if __name__ == "__main__":
    main(sys.argv[1])
