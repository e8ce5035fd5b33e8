"""Four ranks train on many layouts, and their weights go to samplers on others, against vLLM loading full tensors.

Arguments: RESULT SCRATCH. Rank 0 writes what was found, for every layout, in bare parameters of vLLM's models.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from nla_megatron.config.schema import OptimConfig, ParallelConfig
from nla_megatron.conversion.families import FAMILIES
from nla_megatron.conversion.live import global_parameters
from nla_megatron.parallel.collectives import barrier, gather_objects
from nla_megatron.parallel.world import World, initialise
from nla_megatron.reshard.execute import Gate
from nla_megatron.reshard.megatron_side import TrainLayout, tensors_of
from nla_megatron.reshard.plan import world_bytes
from nla_megatron.reshard.resharder import Transfer, held, samplers_of
from nla_megatron.reshard.summary import vllm_config
from nla_megatron.reshard.vllm_side import Trace, trace
from nla_megatron.training.module import TrainModule
from tests.support.reshard import loaded_by_vllm
from tests.support.reshard_models import adapted, shape_of, tensors, trainer


@dataclass(frozen=True)
class Case:
    """A model, its training layout, and the sampler's; `trainers` and `samplers` are ranks where not all take part."""

    family: str
    train: dict[str, Any]
    tp: int
    expert_parallel: bool = False
    dtype: str = "float32"
    lora: bool = False
    masters: bool = False
    samplers: range = field(default=range(4))


CASES = {
    "tp2 to tp1": Case("qwen3", {"tp": 2}, 1),
    "tp1 to tp2": Case("qwen3", {}, 2),
    "tp4 to tp2": Case("qwen3", {"tp": 4}, 2),
    "tp2 to tp2": Case("qwen3", {"tp": 2}, 2),
    "pp2 to tp2, tied": Case("qwen2", {"pp": 2}, 2),
    "tp2 pp2 uneven to tp2": Case("gemma2", {"tp": 2, "pp": 2, "stages": [1, 4]}, 2),
    "pp2 vpp2 to tp4": Case("gemma2", {"pp": 2, "vpp": 2, "stages": [1, 2, 1, 1]}, 4),
    "ep2 to tp2": Case("qwen3-moe", {"ep": 2}, 2),
    "ep2 to tp2 with expert parallelism": Case("qwen3-moe", {"ep": 2}, 2, expert_parallel=True),
    "pp2 ep2 etp1 to tp4 with expert parallelism": Case("mixtral", {"pp": 2, "ep": 2}, 4, expert_parallel=True),
    "tp2 ep2 etp2 to tp1": Case("qwen3-moe", {"tp": 2, "ep": 2, "etp": 2}, 1),
    "fp32 to bf16": Case("qwen3", {"tp": 2, "pp": 2}, 2, dtype="bfloat16"),
    "adapters merged on the way": Case("qwen3", {"tp": 2, "pp": 2}, 2, lora=True),
    "other ranks sample": Case("qwen3", {"tp": 2}, 2, samplers=range(2, 4)),
    "masters of bf16 to fp32": Case("qwen2", {"tp": 2, "pp": 2}, 2, masters=True),
    "masters of bf16 to fp32, two replicas": Case("qwen3", {"tp": 2}, 2, masters=True),
    "masters of bf16 to bf16, four replicas": Case("qwen3-moe", {"ep": 2}, 2, dtype="bfloat16", masters=True),
}
STAGING = 1 << 15
BEYOND_BF16 = 1 + 2.0**-12


def optimised(model: Any, world: World) -> Any:
    """megatron-core's distributed optimizer over the model, its masters moved to where bf16 has no number."""
    module = TrainModule(model, world, OptimConfig(), 1, 1, "bfloat16")
    for parameter in global_parameters(model).values():
        if parameter.main_param is not None:
            parameter.main_param.data.mul_(BEYOND_BF16)
    return module.optimizer


class Bare:
    """Parameters that nothing repacks."""

    def __init__(self, found: Trace | None, gate: Gate):
        parameters = {} if found is None else found.parameters
        self.buffers = {
            name: torch.zeros(one.shape, dtype=getattr(torch, one.dtype)) for name, one in parameters.items()
        }
        self.gate, self.finished = gate, set[str]()

    def tensor(self, name: str) -> Tensor:
        return self.buffers[name]

    def finish(self, name: str) -> None:
        self.gate.arrived(name, self.buffers[name])
        self.finished.add(name)


def on(case: Case, scratch: Path) -> dict[str, Any]:
    world = initialise(ParallelConfig(**case.train))
    shape = shape_of(case.family)
    directory = scratch / f"{case.family}-config"
    if world.is_main:
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps(FAMILIES[shape.family].config_from_shape(shape)))
    barrier(world)
    config = vllm_config(directory, case.dtype)
    full, optimizer = tensors(shape), None
    model = trainer(shape, full, world, "bfloat16" if case.masters else "float32")
    if case.lora:
        full = adapted(model, shape, full, world)
    if case.masters:
        optimizer = optimised(model, world)
        full = {name: tensor.bfloat16().float() * BEYOND_BF16 for name, tensor in full.items()}
    layout = TrainLayout.of(world)
    if len(case.samplers) < world.size:
        layout = replace(layout, dp=1)
    samples = world.rank in case.samplers
    tp_rank = world.rank % case.tp
    mine = trace(config, tensors_of(shape), tp_rank, case.tp, case.expert_parallel) if samples else None
    first = case.samplers[0]
    traces = [one for one in gather_objects(mine if first <= world.rank < first + case.tp else None, world) if one]
    sources, claims = held(model, shape, layout, world, optimizer)
    samplers = samplers_of(traces, case.samplers)
    transfer = Transfer(sources, claims, samplers, world, STAGING)
    into = transfer.run(lambda gate: Bare(mine, gate), seed=3)
    assert isinstance(into, Bare)
    wrong = []
    if samples:
        theirs = loaded_by_vllm(config, full, tp_rank, case.tp, case.expert_parallel)
        wrong = sorted(set(theirs) ^ set(into.finished))
        wrong += [name for name in theirs if name in into.buffers and not same(into.buffers[name], theirs[name], case)]
    needed, local = world_bytes(claims, samplers, "float32")
    plans = gather_objects(
        (transfer.plan.bytes_sent, transfer.plan.bytes_received, transfer.plan.staging, wrong), world
    )
    barrier(world)
    parallel_state.destroy_model_parallel()
    return {
        "sent": sum(plan[0] for plan in plans),
        "received": sum(plan[1] for plan in plans),
        "bound": needed - local,
        "staging": max(plan[2] for plan in plans),
        "different": sorted({one for plan in plans for one in plan[3]}),
    }


def same(ours: Tensor, theirs: Tensor, case: Case) -> bool:
    # What an adapter adds is summed in another order here than on a shard.
    return torch.equal(ours, theirs) if not case.lora else torch.allclose(ours, theirs, rtol=0, atol=1e-5)


def main(result: str, scratch: str) -> None:
    found = {name: on(case, Path(scratch)) for name, case in CASES.items()}
    if os.environ["RANK"] == "0":
        Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:3])
