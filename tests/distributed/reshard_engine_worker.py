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
from nla_megatron.errors import NlaError, NotFinite
from nla_megatron.parallel.collectives import barrier, gather_objects
from nla_megatron.parallel.world import initialise
from nla_megatron.reshard import vllm_load
from nla_megatron.reshard.adapter import AdapterResharder
from nla_megatron.reshard.megatron_side import TrainLayout
from nla_megatron.reshard.resharder import Resharder
from nla_megatron.reshard.summary import summarise
from nla_megatron.rollout.engine import Engine
from tests.support.reshard_models import tensors, trainer
from tests.support.tiny import tiny_model


class Transforms:
    """While `on`, two loaders of vLLM's model do more than copy: they round, and add one."""

    on = False

    @classmethod
    def register(cls) -> None:
        """The engine's model, and every skeleton of it, has the two loaders."""
        from vllm import ModelRegistry
        from vllm.model_executor.model_loader.weight_utils import default_weight_loader
        from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

        class Transforming(Qwen3ForCausalLM):
            def __init__(self, *, vllm_config: Any, prefix: str = ""):
                super().__init__(vllm_config=vllm_config, prefix=prefix)
                self.model.norm.weight.weight_loader = cls.behind(default_weight_loader, lambda one: one + 1)
                down = self.model.layers[1].mlp.down_proj.weight
                rounding = cls.behind(down.weight_loader, lambda one: (one * 64).round() / 64)
                object.__setattr__(down, "_weight_loader", rounding)

        ModelRegistry.register_model("Qwen3ForCausalLM", Transforming)

    @classmethod
    def behind(cls, load: Any, transform: Any) -> Any:
        """As vLLM's `composed_weight_loader`."""

        def loader(param: Any, loaded_weight: Any) -> None:
            load(param, loaded_weight)
            if cls.on:
                param.data.copy_(transform(param))

        return loader


TRANSFORMED = ("model.layers.1.mlp.down_proj.weight", "model.norm.weight")


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


def by_the_ordinary_path(engine: Engine, model: Any, shape: Any, world: Any, full: Any, other: Any) -> dict[str, Any]:
    """With loaders that do more than copy, against vLLM's own load of everything."""
    before = logprobs(engine)
    Transforms.on = True
    engine.load(iter(full.items()))
    expected = logprobs(engine)
    resharder = Resharder(model, shape, engine.llm, shape, world)
    config = resharder.worker.vllm_config
    summary = summarise(shape, config, TrainLayout.of(world), 2, False, "float32", 1 << 20, [0])
    found = {
        "transformed": expected != before,
        "ordinary tensors": resharder.trace.ordinary == TRANSFORMED == summary.ordinary,
        "ordinary told": next(line for line in summary.lines() if line.startswith("ordinary")),
    }
    for load in ("ordinary", "ordinary again"):
        engine.load(iter(other.items()))
        found[f"{load} before"] = logprobs(engine) == expected
        replace_weights(engine, resharder)
        found[load] = logprobs(engine) == expected
    Transforms.on = False
    return found


def after_a_failure(engine: Engine, resharder: Resharder, other: Any, expected: list[float]) -> dict[str, Any]:
    """A load that breaks off with a module open, and one that comes to its end. Nothing travels in this layout."""
    engine.load(iter(other.items()))
    finish = vllm_load.VllmTargets.finish

    def breaks(self: vllm_load.VllmTargets, name: str) -> None:
        if name == "model.layers.2.mlp.down_proj.weight":
            raise NotFinite("it broke", "it to hold", "load again")
        finish(self, name)

    vllm_load.VllmTargets.finish = breaks  # type: ignore[method-assign]
    found = {"broken off": named(lambda: replace_weights(engine, resharder))}
    vllm_load.VllmTargets.finish = finish  # type: ignore[method-assign]
    replace_weights(engine, resharder)
    return {**found, "after breaking off": logprobs(engine) == expected}


def replace_weights(engine: Engine, resharder: Resharder, times: int = 1) -> None:
    with engine.replacing_weights():
        for _ in range(times):
            resharder.load()


@torch.no_grad()
def in_a_running_engine(scratch: Path) -> dict[str, Any]:
    world, directory = initialise(ParallelConfig(tp=2, pp=2)), scratch / "model"
    if world.is_main:
        tiny_model(directory)
    barrier(world)
    shape = read_shape(directory)
    rollout = RolloutConfig(tp=2, max_new_tokens=12, max_num_batched_tokens=512, max_num_seqs=16, cpu_kv_cache_gib=0.1)
    Transforms.register()
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
        replace_weights(engine, resharder)
        found[layout] = logprobs(engine) == expected
    found |= after_a_failure(engine, resharder, other, expected)
    found |= by_the_ordinary_path(engine, model, shape, world, full, other)
    resharder = Resharder(model, shape, engine.llm, shape, world)
    parameter = next(iter(global_parameters(model).values()))
    parameter[0] += 1.0 if world.rank == 1 else 0.0
    found["replicas apart"] = named(lambda: replace_weights(engine, resharder, times=10))
    found["refused after"] = named(lambda: engine._run([(1, 2)], [], None))
    if world.rank == 3:
        parameter[0, 0] = float("nan")
    found["nan"] = named(resharder.load)
    found["other model"] = named(
        lambda: Resharder(model, shape, engine.llm, replace(shape, vocab_size=shape.vocab_size + 1), world)
    )
    found["no adapters"] = named(lambda: AdapterResharder(model, shape, engine.llm, world))
    everyone = gather_objects(found, world)
    engine.close()
    return {key: sorted({str(one[key]) for one in everyone}) for key in found}


if __name__ == "__main__":
    main(*sys.argv[1:3])
