"""A LoRA policy as an adapter in vLLM, with an injection at the same time, against `peft` and against merged weights.

Arguments: RESULT SCRATCH TP. Rank 0 writes what was found. At TP 1 each rank is a replica of its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from safetensors.torch import load_file

from nla_megatron.config.schema import ParallelConfig, RolloutConfig
from nla_megatron.conversion.hf import read_shape
from nla_megatron.conversion.live import global_parameters, load_from_hf
from nla_megatron.conversion.merge import merge
from nla_megatron.conversion.peft import adapter_config, adapter_exporter, load_adapter
from nla_megatron.conversion.peft_format import WEIGHTS, read_peft_config
from nla_megatron.interventions.spec import Intervention
from nla_megatron.models.verbalizer import build_verbalizer
from nla_megatron.parallel.collectives import barrier, gather_objects
from nla_megatron.parallel.world import World, initialise
from nla_megatron.reshard.adapter import AdapterResharder
from nla_megatron.reshard.resharder import Resharder
from nla_megatron.rollout.engine import Engine, PromptRequest
from nla_megatron.types import Rollout
from tests.support import hooked
from tests.support.adapters import peft_adapter
from tests.support.refusals import named
from tests.support.tiny import tiny_model

POSITION, EOS, GROUPS = 4, 2, 4
CONFIG = RolloutConfig(
    max_new_tokens=10, max_num_seqs=8, kv_block_size=32, max_model_len=128, lora="adapter", cpu_kv_cache_gib=0.1
)
ADAPTERS: dict[str, dict[str, Any]] = {
    "first": {
        "r": 4, "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    },
    "second": {
        "r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"down_proj": 32},
    },
}  # fmt: skip


def make_sources(scratch: Path) -> None:
    tiny_model(scratch / "base", num_layers=3)
    for name, options in ADAPTERS.items():
        peft_adapter(scratch / "base", scratch / name, options, seed=len(name))
    merge(scratch / "base", scratch / "first", scratch / "first_merged")


def adapted(scratch: Path, name: str, noise: float = 0.0) -> hooked.Hooked:
    """The base model with an adapter of `peft`'s on it; `noise` changes the base's weights first."""
    from peft import PeftModel

    reference = hooked.Hooked(scratch / "base")
    noisy(reference.model, noise)
    reference.model = PeftModel.from_pretrained(reference.model, str(scratch / name)).base_model.model
    return reference


def noisy(model: torch.nn.Module, scale: float) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


class Bench:
    def __init__(self, scratch: Path, tp: int):
        self.world, self.scratch = initialise(ParallelConfig(tp=tp)), scratch
        if self.world.is_main:
            make_sources(scratch)
        barrier(self.world)
        self.shape = read_shape(scratch / "base")
        rng = np.random.default_rng(3)
        self.vectors = rng.standard_normal((GROUPS, self.shape.hidden_size)).astype(np.float32) * 4
        self.requests = [
            PromptRequest(group, group, tuple(int(each) for each in rng.integers(5, 590, 40)), POSITION, group)
            for group in range(GROUPS)
        ]
        self.engine = Engine(
            str(scratch / "base"), self.shape, replace(CONFIG, tp=tp), Intervention(1), self.world, EOS, 0
        )

    def sample(self) -> tuple[Rollout, ...]:
        return self.engine.generate(self.requests, self.read, 1).rollouts

    def read(self, rows: Sequence[int]) -> np.ndarray:
        return self.vectors[list(rows)]

    def gap(self, rollouts: Sequence[Rollout], reference: hooked.Hooked) -> float:
        worst = 0.0
        for rollout in rollouts:
            vector = torch.from_numpy(self.vectors[rollout.row])
            change = hooked.Change(1, hooked.norm_add, vector, lambda t: 1.0 if t == POSITION else None)
            want = reference.logprobs(rollout.prompt_ids, rollout.response_ids, [change])
            worst = max(worst, float((want - torch.tensor(rollout.logprobs)).abs().max()))
        return worst

    def from_cache(self) -> int:
        """Requests of the last batch, over all replicas' first ranks, whose marker came out of the cache."""
        tp = self.engine.config.tp
        everyone = gather_objects([any(report.cached) for report in self.engine.reports], self.world)
        return sum(sum(each) for each in everyone[::tp])


def live(scratch: Path, shape: Any, world: World) -> Any:
    """The trainer's model with the first adapter on it."""
    model = build_verbalizer(shape, world, "float32")
    load_from_hf(model, str(scratch / "base"), shape, world, with_head=True)
    load_adapter(model, scratch / "first", shape, world)
    return model


def resharded(bench: Bench) -> dict[str, Any]:
    """Base and adapter by their plans, from a trainer whose blocks lie on two stages."""
    parallel_state.destroy_model_parallel()
    world, llm, shape = initialise(ParallelConfig(pp=2)), bench.engine.llm, bench.shape
    model = build_verbalizer(shape, world, "float32")
    load_from_hf(model, str(bench.scratch / "base"), shape, world, with_head=True)
    with bench.engine.replacing_weights():
        Resharder(model, shape, llm, shape, world).load()
    out: dict[str, Any] = {"no_adapters": named(lambda: AdapterResharder(model, shape, llm, world))}
    load_adapter(model, bench.scratch / "second", shape, world)
    resharder = AdapterResharder(model, shape, llm, world)
    resharder.load(bench.engine.load_adapter)
    out["gap_planned"] = bench.gap(bench.sample(), adapted(bench.scratch, "second"))
    plans = gather_objects((resharder.transfer.plan.bytes_sent, resharder.transfer.plan.bytes_needed), world)
    out["planned_bytes"] = [sum(each) for each in zip(*plans, strict=True)]
    with torch.no_grad():
        for name, parameter in global_parameters(model).items():
            if name.endswith(".B"):
                parameter *= 1.5 if world.rank == 0 else 0.5
    resharder.load(bench.engine.load_adapter)
    out["gap_to_second"] = bench.gap(bench.sample(), adapted(bench.scratch, "second"))
    return out


def faults(bench: Bench, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    engine, config = bench.engine, read_peft_config(bench.scratch / "second")
    key = next(iter(tensors))
    out = {
        "half": named(lambda: engine.load_adapter([(key, tensors[key])], config)),
        "rank": named(lambda: engine.load_adapter(tensors.items(), replace(config, rank=9))),
        "no_pair": named(lambda: engine.load_adapter([("lm_head.weight", tensors[key])], config)),
        "stranger": named(
            lambda: engine.load_adapter(((k.replace("layers.2", "layers.7"), t) for k, t in tensors.items()), config)
        ),
    }
    kept, engine.config = engine.config, replace(engine.config, lora_rank=4)
    out["too_large"] = named(lambda: engine.load_adapter(tensors.items(), config))
    engine.config = replace(kept, lora="merged")
    out["not_asked_for"] = named(lambda: engine.load_adapter(tensors.items(), config))
    engine.config = kept
    return out


def stops(bench: Bench) -> dict[str, Any]:
    """The same responses with and without a text that ends them."""
    engine, free = bench.engine, bench.sample()
    text = engine.tokenizer.decode(free[0].response_ids[3:5])
    engine.config = replace(engine.config, stop=[text])
    stopped = bench.sample()
    engine.config = replace(engine.config, stop=[])
    short = stopped[0]
    return {
        "stopped_text": [text, short.text],
        "stopped_finished": [each.finished for each in (free[0], short)],
        "stopped_prefix": list(free[0].response_ids[: len(short.response_ids)]) == list(short.response_ids),
        "stopped_lengths": [len(free[0].response_ids), len(short.response_ids), len(short.logprobs)],
    }


def main(result: str, scratch: str, tp: str) -> None:
    bench = Bench(Path(scratch), int(tp))
    engine, world = bench.engine, bench.world
    out: dict[str, Any] = {"not_loaded": named(bench.sample)}
    model = live(bench.scratch, bench.shape, world)
    engine.load_adapter(adapter_exporter(model, bench.shape, world).tensors(), adapter_config(model))
    first = bench.sample()
    out["gap"] = bench.gap(first, adapted(bench.scratch, "first"))
    out["gap_to_merged"] = bench.gap(first, hooked.Hooked(bench.scratch / "first_merged"))
    out["gap_to_base"] = bench.gap(first, hooked.Hooked(bench.scratch / "base"))
    bench.sample()
    out["from_cache"] = [bench.from_cache()]
    tensors, config = load_file(bench.scratch / "second" / WEIGHTS), read_peft_config(bench.scratch / "second")
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    for _ in range(2):
        engine.load_adapter(tensors.items(), config)
    second = bench.sample()
    out["from_cache"].append(bench.from_cache())
    out["gap_of_second"] = bench.gap(second, adapted(bench.scratch, "second"))
    out["gap_to_first"] = bench.gap(second, adapted(bench.scratch, "first"))
    out["untouched"] = all(torch.equal(tensors[name], tensor) for name, tensor in kept.items())
    changed = noisy(hooked.Hooked(bench.scratch / "base").model, 0.05)
    engine.load((name, parameter.detach()) for name, parameter in changed.named_parameters())
    out["gap_on_other_base"] = bench.gap(bench.sample(), adapted(bench.scratch, "second", 0.05))
    out |= faults(bench, tensors)
    out["gap_after_faults"] = bench.gap(bench.sample(), adapted(bench.scratch, "second", 0.05))
    out |= stops(bench)
    out |= resharded(bench)
    if world.is_main:
        Path(result).write_text(json.dumps(out))
    barrier(world)
    engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:4])
