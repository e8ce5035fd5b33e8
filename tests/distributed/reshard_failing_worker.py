"""Four ranks, of which the second one raises or is killed in the middle of a load. Arguments: SCRATCH raises|killed.

A rank that outlives it writes what its engine says when it is asked to generate.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from nla_megatron.config.schema import ParallelConfig, RolloutConfig
from nla_megatron.conversion.hf import read_shape
from nla_megatron.errors import PeerLost
from nla_megatron.interventions.spec import Intervention
from nla_megatron.launch.ending import exit_code_after
from nla_megatron.models.verbalizer import build_verbalizer
from nla_megatron.parallel.collectives import barrier
from nla_megatron.parallel.world import initialise
from nla_megatron.reshard import vllm_load
from nla_megatron.reshard.resharder import Resharder
from nla_megatron.rollout.engine import Engine
from tests.support.refusals import named
from tests.support.tiny import tiny_model

STAGING = 1 << 15


def main(scratch: str, how: str) -> None:
    directory, world = Path(scratch) / "model", initialise(ParallelConfig(tp=2, pp=2))
    if world.is_main:
        tiny_model(directory)
    barrier(world)
    shape = read_shape(directory)
    config = RolloutConfig(tp=2, max_new_tokens=4, max_num_seqs=2, max_model_len=64, cpu_kv_cache_gib=0.1)
    engine = Engine(str(directory), shape, config, Intervention(0), world, 2, 0)
    resharder = Resharder(build_verbalizer(shape, world, "float32"), shape, engine.llm, shape, world, STAGING)
    # A load that nothing goes wrong in comes first, so that what fails is a later step's.
    with engine.replacing_weights():
        resharder.load()
    assert len(resharder.transfer.plan.buckets) > 4

    def fails(self: vllm_load.VllmTargets, name: str) -> None:
        Path(scratch, "failed").touch()
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("the memory of rank 1 is broken")

    if world.rank == 1:
        vllm_load.VllmTargets.finish = fails  # type: ignore[method-assign]
    try:
        with engine.replacing_weights():
            resharder.load()
    except (RuntimeError, PeerLost) as error:
        Path(scratch, f"rank{world.rank}").write_text(named(lambda: engine._run([(1, 2)], [], {})))
        sys.exit(exit_code_after(error))
    print("past the failure")


if __name__ == "__main__":
    main(*sys.argv[1:3])
