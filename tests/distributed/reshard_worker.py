"""Four ranks train on many layouts, and their weights go to samplers on others, against vLLM loading full tensors.

Arguments: RESULT SCRATCH PART. Rank 0 writes what was found. Part "bare": every layout, into bare parameters of vLLM's
models. Part "engine": into a running engine, by its log-probs and by what it refuses.
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

from nla_megatron.config.schema import InterventionConfig, ParallelConfig, RolloutConfig
from nla_megatron.conversion.families import FAMILIES, rules_of
from nla_megatron.conversion.hf import read_shape
from nla_megatron.conversion.live import global_parameters, place_of
from nla_megatron.conversion.peft import fused_layers
from nla_megatron.conversion.rules import by_name
from nla_megatron.errors import NlaError
from nla_megatron.models.decoder import build_chunks
from nla_megatron.models.lora import LORA, add_lora
from nla_megatron.models.lora_spec import LoraSpec
from nla_megatron.models.verbalizer import Verbalizer
from nla_megatron.parallel.collectives import barrier, gather_objects
from nla_megatron.parallel.world import World, initialise
from nla_megatron.reshard import vllm_side
from nla_megatron.reshard.execute import Gate
from nla_megatron.reshard.megatron_side import TrainLayout, claims_of, tensors_of
from nla_megatron.reshard.plan import world_bytes
from nla_megatron.reshard.resharder import Resharder, Transfer, samplers_of
from nla_megatron.reshard.summary import vllm_config
from nla_megatron.reshard.vllm_side import Trace, trace
from nla_megatron.rollout.engine import Engine
from nla_megatron.types import ModelShape
from tests.support.families import family_shape
from tests.support.tiny import tiny_model


@dataclass(frozen=True)
class Case:
    """A model, its training layout, and the sampler's; `trainers` and `samplers` are ranks where not all take part."""

    family: str
    train: dict[str, Any]
    tp: int
    expert_parallel: bool = False
    dtype: str = "float32"
    lora: bool = False
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
}
STAGING = 1 << 15


def shape_of(name: str) -> ModelShape:
    shape = family_shape(name)
    shape = replace(shape, hidden_size=64) if shape.experts is not None else shape
    return replace(shape, tied_embeddings=True) if name.startswith("gemma") else shape


def tensors(shape: ModelShape) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(size, generator=generator) for name, size in tensors_of(shape).items()}


@torch.no_grad()
def trainer(shape: ModelShape, full: dict[str, Tensor], world: World) -> Any:
    """A model whose every parameter is cut from `full` by the conversion rules."""
    model, rules = build_chunks(Verbalizer, shape, world, "float32"), by_name(rules_of(shape, True))
    for name, parameter in global_parameters(model).items():
        rule = rules[name]
        parameter.copy_(rule.read(lambda one, axis, a, b: full[one].narrow(axis, a, b - a), *place_of(rule, world)))
    return model


@torch.no_grad()
def adapted(model: Any, shape: ModelShape, full: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """Adapt the model; returns the tensors that it then stands for, merged by PyTorch in one place."""
    add_lora(model, fused_layers(shape, world.tp), LoraSpec(2, 4.0, targets=("q_proj", "v_proj")))
    for name, parameter in global_parameters(model).items():
        if f".{LORA}." in name and name.endswith(".B"):
            parameter.fill_(0.25)
    low = torch.full((1, 2), 0.25)
    out = dict(full)
    for rank in gather_objects(own_A(model, world), world):
        for name, A in rank.items():
            delta = (low.expand(len(full[name]), 2) @ A) * 2.0
            out[name] = full[name] + delta
    return out


def own_A(model: Any, world: World) -> dict[str, Tensor]:
    """A of every adapted projection of this rank by HF name, where it is whole."""
    from nla_megatron.models.lora import adapted as adapted_layers

    return {
        f"{slot.hf}.weight": pair.A.detach()
        for linear in adapted_layers(model).values()
        for slot in linear.lora.layer.slots
        for name, pair in linear.lora.pairs.items()
        if name == slot.projection and not linear.lora.layer.inputs_cut
    }


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


def loaded_by_vllm(config: Any, full: dict[str, Tensor], rank: int, case: Case) -> dict[str, Tensor]:
    with vllm_side._as_rank(rank, case.tp, case.expert_parallel, config):
        model = vllm_side.skeleton(config, torch.device("cpu"))
        for parameter in model.parameters():
            parameter.data.zero_()
        model.load_weights(iter(full.items()))
    return dict(model.named_parameters())


def on(case: Case, scratch: Path) -> dict[str, Any]:
    world = initialise(ParallelConfig(**case.train))
    shape = shape_of(case.family)
    directory = scratch / f"{case.family}-config"
    if world.is_main:
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps(FAMILIES[shape.family].config_from_shape(shape)))
    barrier(world)
    config = vllm_config(directory, case.dtype)
    full = tensors(shape)
    model = trainer(shape, full, world)
    if case.lora:
        full = adapted(model, shape, full, world)
    layout = TrainLayout.of(world)
    if len(case.samplers) < world.size:
        layout = replace(layout, dp=1)
    samples = world.rank in case.samplers
    tp_rank = world.rank % case.tp
    mine = trace(config, tensors_of(shape), tp_rank, case.tp, case.expert_parallel) if samples else None
    first = case.samplers[0]
    traces = [one for one in gather_objects(mine if first <= world.rank < first + case.tp else None, world) if one]
    claims, samplers = claims_of(shape, layout), samplers_of(traces, case.samplers)
    transfer = Transfer(model, claims, samplers, world, STAGING)
    into = transfer.run(lambda gate: Bare(mine, gate), seed=3)
    assert isinstance(into, Bare)
    wrong = []
    if samples:
        theirs = loaded_by_vllm(config, full, tp_rank, case)
        wrong = sorted(set(theirs) ^ set(into.finished))
        wrong += [name for name in theirs if name in into.buffers and not same(into.buffers[name], theirs[name], case)]
    needed, held = world_bytes(claims, samplers, "float32")
    plans = gather_objects(
        (transfer.plan.bytes_sent, transfer.plan.bytes_received, transfer.plan.staging, wrong), world
    )
    barrier(world)
    parallel_state.destroy_model_parallel()
    return {
        "sent": sum(plan[0] for plan in plans),
        "received": sum(plan[1] for plan in plans),
        "bound": needed - held,
        "staging": max(plan[2] for plan in plans),
        "different": sorted({one for plan in plans for one in plan[3]}),
    }


def same(ours: Tensor, theirs: Tensor, case: Case) -> bool:
    # What an adapter adds is summed in another order here than on a shard.
    return torch.equal(ours, theirs) if not case.lora else torch.allclose(ours, theirs, rtol=0, atol=1e-5)


def main(result: str, scratch: str, part: str) -> None:
    if part == "engine":
        found = in_a_running_engine(Path(scratch))
    else:
        found = {name: on(case, Path(scratch)) for name, case in CASES.items()}
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
    main(*sys.argv[1:4])
