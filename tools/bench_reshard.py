"""Measure resharding on this machine, on four ranks: `python tools/bench_reshard.py`.

A random Qwen3 of about 200 M parameters trains on TP 2 x PP 2 and samples on two vLLM replicas of TP 2, in the same
four processes, fp32. It is handed over by its plan, and by a full gather: every tensor exported on every rank and
loaded by vLLM. Medians of three after one of each to warm up; start-up is left out. The last line is JSON:

    sent_over_bound_max    bytes sent over those that are needed and not held, the most of the layouts in LAYOUTS; 1.0
    exact                  the engine's log-probs after both ways are the same bits
    speedup_over_gather    seconds of the full gather over seconds of the plan; at least 4
    staging_over_bound     the most that packed messages took, over what they may take; at most 1
    plan_seconds_70b       vLLM's loaders traced for one rank and the plan of one rank, Llama-70B's shape; at most 5
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nla_megatron.config.schema import InterventionConfig, ParallelConfig, RolloutConfig
from nla_megatron.conversion.families import FAMILIES
from nla_megatron.launch.commands import silence_libraries
from nla_megatron.launch.local import launch
from nla_megatron.types import ModelShape

SHAPE = ModelShape(
    family="Qwen3ForCausalLM", num_layers=16, hidden_size=1024, ffn_hidden_size=2816, num_heads=16, num_kv_heads=8,
    head_dim=64, vocab_size=8192, rope_theta=1e6, norm_eps=1e-6, tied_embeddings=False, qk_norm=True, max_positions=512,
)  # fmt: skip
LLAMA_70B = replace(
    SHAPE, family="LlamaForCausalLM", num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_heads=64,
    head_dim=128, vocab_size=128_256, qk_norm=False,
)  # fmt: skip
LAYOUTS = [({"tp": 2, "dp": 2}, 1), ({"dp": 4}, 2), ({"tp": 4}, 2), ({"pp": 2, "dp": 2}, 2), ({"tp": 2, "pp": 2}, 2)]
STAGING, REPEATS, RANKS = 64 << 20, 3, 4


def with_config(directory: Path, shape: ModelShape) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(FAMILIES[shape.family].config_from_shape(shape)))
    return directory


def on_paper(scratch: Path) -> dict[str, float]:
    """What needs no weights."""
    from nla_megatron.reshard.megatron_side import TrainLayout
    from nla_megatron.reshard.summary import ratio, summarise, vllm_config

    worst, config = 0.0, vllm_config(with_config(scratch / "small", SHAPE), "float32")
    for options, tp in LAYOUTS:
        layout = TrainLayout(**options, etp=options.get("tp", 1))
        found = summarise(SHAPE, config, layout, tp, False, "float32", STAGING, range(RANKS))
        worst = max(worst, ratio(found.received, found.bound))
    config = vllm_config(with_config(scratch / "large", LLAMA_70B), "bfloat16")
    found = summarise(LLAMA_70B, config, TrainLayout(tp=8, pp=4, dp=2, etp=8), 8, False, "bfloat16", STAGING, [0])
    return {"sent_over_bound_max": worst, "plan_seconds_70b": found.seconds_traced / 8 + found.seconds_planned}


def seconds(call: Callable[[], Any], world: Any) -> float:
    from nla_megatron.parallel.collectives import barrier

    times = []
    for _ in range(1 + REPEATS):
        barrier(world)
        start = time.perf_counter()
        call()
        barrier(world)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def measure(arguments: Sequence[str]) -> int:
    """One rank; rank 0 writes what it found beside the model."""
    from vllm import SamplingParams

    from nla_megatron.conversion.live import Exporter
    from nla_megatron.models.verbalizer import build_verbalizer
    from nla_megatron.parallel.collectives import gather_objects
    from nla_megatron.parallel.world import initialise
    from nla_megatron.reshard.resharder import Resharder
    from nla_megatron.rollout.engine import Engine

    silence_libraries()
    directory, world = Path(arguments[0]), initialise(ParallelConfig(tp=2, pp=2))
    rollout = RolloutConfig(tp=2, max_model_len=256, max_num_batched_tokens=256, max_num_seqs=4)
    engine = Engine(str(directory), SHAPE, rollout, InterventionConfig("norm_add", 1, 1.0), world, 2, 0)
    model = build_verbalizer(SHAPE, world, "float32")
    exporter = Exporter(model, SHAPE, world, with_head=True)
    resharder = Resharder(model, SHAPE, engine.llm, SHAPE, world, STAGING)

    def logprobs() -> list[float]:
        prompt = {"prompt_token_ids": list(range(5, 100))}
        [output] = engine.llm.generate([prompt], SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
        return [next(iter(step.values())).logprob for step in output.prompt_logprobs[1:]]

    gather = seconds(lambda: engine.load(exporter.tensors()), world)
    expected = logprobs()
    engine.load((name, tensor * 0.5) for name, tensor in exporter.tensors())
    planned = seconds(resharder.load, world)
    found = gather_objects((logprobs() == expected, resharder.transfer.peak / STAGING), world)
    if world.is_main:
        print(f"full gather {gather:.2f} s, plan {planned:.2f} s", file=sys.stderr)
        result = {"exact": all(one for one, _ in found), "speedup_over_gather": gather / planned,
                  "staging_over_bound": max(peak for _, peak in found)}  # fmt: skip
        (directory / "result.json").write_text(json.dumps(result))
    engine.close()
    return 0


def make_model(directory: Path) -> None:
    """Random weights for the engine to start from, and the tokenizer that it asks for."""
    from pydoc_data.topics import topics

    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from nla_megatron.datagen.tokenizer import train_tokenizer

    train_tokenizer((topics[name] for name in sorted(topics)[:12]), 600, directory)
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**FAMILIES[SHAPE.family].config_from_shape(SHAPE))).save_pretrained(directory)


def main() -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    silence_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "model"
        make_model(directory)
        found = on_paper(Path(scratch))
        code = launch(measure, [str(directory)], RANKS, ["nla_megatron.rollout.preload"])
        if code == 0:
            print(json.dumps(found | json.loads((directory / "result.json").read_text())))
    return code


if __name__ == "__main__":
    sys.exit(main())
