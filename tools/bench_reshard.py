"""Measure resharding on this machine, on four ranks: `python tools/bench_reshard.py`.

A random Qwen3 of about 200 M parameters trains on TP 2 x PP 2 and samples on two vLLM replicas of TP 2, in the same
four processes, fp32. It is handed over by its plan, and by a full gather: every tensor exported on every rank and
loaded by vLLM. Medians of three after one of each to warm up; start-up is left out. The last line is JSON:

    sent_over_bound_max    bytes sent over those that are needed and not held, the most of the layouts in LAYOUTS; 1.0
    exact                  the engine's log-probs after both ways are the same bits
    speedup_over_gather    seconds of the full gather over seconds of the plan; at least 4
    gather, plan           of one rank and one load: seconds, the processor's in the program and in the kernel, pages
                           that the kernel had to find, and seconds in vLLM's repacking, which is in both
    peak_extra_bytes_plan, peak_extra_bytes_gather
                           the most that any rank's process grew by during a load (its high-water mark over what it
                           held before), by the plan and by the full gather; vLLM's own repacking is in both,
                           the allocator's fragmentation in neither
    staging_over_bound     peak_extra_bytes_plan over what packed messages may take; at most 1
    packed_over_bound      of that the packed messages alone
    plan_seconds_70b       vLLM's loaders traced for one rank and the plan of one rank, Llama-70B's shape; at most 5
    plan_seconds_235b      the same for Qwen3-235B-A22B on 10,000 ranks; at most 60
    plan_growth            seconds per tensor for all of its blocks, over those for a quarter of them; near 1

What one GPU makes of a plan's local copies, with torch alone; the plan is made where vLLM is. The last line is JSON:
`bytes`, `copies`, and `fraction_of_copy_bandwidth`, bytes per second over those of one contiguous copy; at least 0.6.

    python tools/bench_reshard.py --plan-for-gpu copies.json
    python tools/bench_reshard.py --gpu copies.json
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

from nla_megatron.config.schema import InterventionConfig, ParallelConfig, RolloutConfig
from nla_megatron.conversion.families import FAMILIES
from nla_megatron.errors import ConfigError, NlaError
from nla_megatron.launch.commands import silence_libraries
from nla_megatron.launch.local import launch
from nla_megatron.types import Experts, ModelShape

SHAPE = ModelShape(
    family="Qwen3ForCausalLM", num_layers=16, hidden_size=1024, ffn_hidden_size=2816, num_heads=16, num_kv_heads=8,
    head_dim=64, vocab_size=8192, rope_theta=1e6, norm_eps=1e-6, tied_embeddings=False, qk_norm=True, max_positions=512,
)  # fmt: skip
LLAMA_70B = replace(
    SHAPE, family="LlamaForCausalLM", num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_heads=64,
    head_dim=128, vocab_size=128_256, qk_norm=False,
)  # fmt: skip
QWEN3_235B = replace(
    SHAPE, family="Qwen3MoeForCausalLM", num_layers=94, hidden_size=4096, ffn_hidden_size=12288, num_heads=64,
    num_kv_heads=4, head_dim=128, vocab_size=151_936, experts=Experts(128, 8, 1536),
)  # fmt: skip
QWEN3_8B = replace(
    SHAPE, num_layers=36, hidden_size=4096, ffn_hidden_size=12288, num_heads=32, head_dim=128, vocab_size=151_936
)
LAYOUTS = [({"tp": 2, "dp": 2}, 1), ({"dp": 4}, 2), ({"tp": 4}, 2), ({"pp": 2, "dp": 2}, 2), ({"tp": 2, "pp": 2}, 2)]
STAGING, REPEATS, RANKS = 64 << 20, 3, 4


def with_config(directory: Path, shape: ModelShape) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(FAMILIES[shape.family].config_from_shape(shape)))
    return directory


def on_paper(scratch: Path) -> dict[str, float]:
    """What needs no weights."""
    from nla_megatron.reshard.megatron_side import TrainLayout, tensors_of
    from nla_megatron.reshard.summary import ratio, summarise, vllm_config

    worst, config = 0.0, vllm_config(with_config(scratch / "small", SHAPE), "float32")
    for options, tp in LAYOUTS:
        layout = TrainLayout(**options, etp=options.get("tp", 1))
        found = summarise(SHAPE, config, layout, tp, False, "float32", STAGING, range(RANKS))
        worst = max(worst, ratio(found.received, found.bound))
    large = planning_seconds(scratch / "70b", LLAMA_70B, TrainLayout(tp=8, pp=4, dp=2, etp=8))
    # 10,000 ranks: experts over eight of the 5,000 ranks of each stage.
    layout = TrainLayout(tp=4, pp=2, dp=1250, ep=8, etp=1)
    mixture = planning_seconds(scratch / "235b", QWEN3_235B, layout)
    part = replace(QWEN3_235B, num_layers=24)
    quarter = planning_seconds(scratch / "quarter", part, layout)
    growth = (mixture / len(tensors_of(QWEN3_235B))) / (quarter / len(tensors_of(part)))
    return {
        "sent_over_bound_max": worst, "plan_seconds_70b": large, "plan_seconds_235b": mixture, "plan_growth": growth
    }  # fmt: skip


def planning_seconds(directory: Path, shape: ModelShape, layout: Any) -> float:
    """What one rank of a bf16 world that samples at TP 8, its experts shared out, waits for its plan."""
    from nla_megatron.reshard.summary import summarise, vllm_config

    config = vllm_config(with_config(directory, shape), "bfloat16")
    found = summarise(shape, config, layout, 8, shape.experts is not None, "bfloat16", STAGING, [0])
    return found.seconds_traced / 8 + found.seconds_planned


def cost(call: Callable[[], Any], world: Any) -> dict[str, float]:
    """What one load costs this rank: medians over REPEATS."""
    from vllm import _custom_ops

    from nla_megatron.parallel.collectives import barrier

    repack, repacking = _custom_ops.create_onednn_mm, 0.0

    def timed(*arguments: Any) -> Any:
        nonlocal repacking
        start = time.perf_counter()
        made = repack(*arguments)
        repacking += time.perf_counter() - start
        return made

    found = []
    _custom_ops.create_onednn_mm = timed
    for _ in range(1 + REPEATS):
        barrier(world)
        repacking, before, start = 0.0, getrusage(RUSAGE_SELF), time.perf_counter()
        call()
        barrier(world)
        took, after = time.perf_counter() - start, getrusage(RUSAGE_SELF)
        found.append({
            "seconds": took, "program": after.ru_utime - before.ru_utime, "kernel": after.ru_stime - before.ru_stime,
            "pages": after.ru_minflt - before.ru_minflt, "repacking": repacking,
        })  # fmt: skip
    _custom_ops.create_onednn_mm = repack
    return {name: statistics.median(one[name] for one in found[1:]) for name in found[0]}


def peak_extra(call: Callable[[], Any]) -> int:
    """The bytes that this process holds at most during a call beyond those that it holds before."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water()
    call()
    return high_water() - before


def high_water() -> int:
    [kib] = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kib) << 10


def measure(arguments: Sequence[str]) -> int:
    """One rank, for "seconds" or "memory"; rank 0 writes what it found beside the model."""
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

    def hand_over() -> None:
        with engine.replacing_weights():
            resharder.load()

    def logprobs() -> list[float]:
        prompt = {"prompt_token_ids": list(range(5, 100))}
        [output] = engine.llm.generate([prompt], SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
        return [next(iter(step.values())).logprob for step in output.prompt_logprobs[1:]]

    if arguments[1] == "memory":
        # The second of each, so that what is there before was allocated in the same way.
        for _ in range(2):
            peaks = [peak_extra(hand_over), peak_extra(lambda: engine.load(exporter.tensors()))]
        plan, whole = (max(one) for one in zip(*gather_objects(peaks, world), strict=True))
        result = {
            "peak_extra_bytes_plan": plan, "peak_extra_bytes_gather": whole, "staging_over_bound": plan / STAGING
        }  # fmt: skip
    else:
        gather = cost(lambda: engine.load(exporter.tensors()), world)
        expected = logprobs()
        engine.load((name, tensor * 0.5) for name, tensor in exporter.tensors())
        planned = cost(hand_over, world)
        found = gather_objects((logprobs() == expected, resharder.transfer.peak / STAGING), world)
        exact, packed = all(one for one, _ in found), max(one for _, one in found)
        result = {
            "exact": exact, "speedup_over_gather": gather["seconds"] / planned["seconds"], "packed_over_bound": packed,
            "gather": gather, "plan": planned,
        }  # fmt: skip
    if world.is_main:
        (directory / f"{arguments[1]}.json").write_text(json.dumps(result))
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


def write_local_copies(path: Path, shape: ModelShape, tp: int) -> None:
    """One rank's local copies where trainer and sampler both lie on `tp` ranks; sizes of buffers in elements."""
    from nla_megatron.reshard.megatron_side import TrainLayout, claims_of, tensors_of
    from nla_megatron.reshard.plan import compile_plan
    from nla_megatron.reshard.resharder import samplers_of
    from nla_megatron.reshard.summary import vllm_config
    from nla_megatron.reshard.vllm_side import trace

    layout = TrainLayout(tp=tp, etp=tp)
    with tempfile.TemporaryDirectory() as scratch:
        config = vllm_config(with_config(Path(scratch) / "model", shape), "bfloat16")
        traces = [trace(config, tensors_of(shape), rank, tp, False) for rank in range(tp)]
    plan = compile_plan(claims_of(shape, layout), samplers_of(traces, layout.ranks), 0, "bfloat16", STAGING)
    copies = [copy for bucket in plan.buckets for copy in bucket.local]
    sizes: dict[str, dict[str, int]] = {"sources": {}, "targets": {}}
    for copy in copies:
        for side, name, offset, strides in (
            ("sources", copy.source, copy.source_offset, copy.source_strides),
            ("targets", copy.target, copy.target_offset, copy.target_strides),
        ):
            last = offset + sum((n - 1) * step for n, step in zip(copy.shape, strides, strict=True))
            sizes[side][name] = max(sizes[side].get(name, 0), last + 1)
    path.write_text(json.dumps({"copies": copies, **sizes}))


def on_gpu(path: Path) -> dict[str, float]:
    """Needs torch and a GPU, and nothing else. Raises ConfigError without one."""
    import torch

    from nla_megatron.reshard.copies import Copy
    from nla_megatron.reshard.execute import do

    if not torch.cuda.is_available():
        raise ConfigError("--gpu on a machine without a CUDA device", "one GPU", "run it where there is one")
    known = json.loads(path.read_text())
    make = {"dtype": torch.bfloat16, "device": "cuda"}
    sources, targets = (
        {name: torch.ones(size, **make) for name, size in known[side].items()} for side in ("sources", "targets")
    )
    copies = [Copy(*(tuple(one) if isinstance(one, list) else one for one in copy)) for copy in known["copies"]]

    def all_of_them() -> None:
        for copy in copies:
            do(copy, sources[copy.source], targets[copy.target])

    moved = 2 * sum(torch.Size(copy.shape).numel() for copy in copies)
    one_gib, other = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    plain = (1 << 30) / gpu_seconds(lambda: other.copy_(one_gib))
    fraction = moved / gpu_seconds(all_of_them) / plain
    return {"bytes": moved, "copies": len(copies), "fraction_of_copy_bandwidth": fraction}


def gpu_seconds(call: Callable[[], Any]) -> float:
    import torch

    times = []
    for _ in range(2 + REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def on_ranks() -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    silence_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "model"
        make_model(directory)
        found = on_paper(Path(scratch))
        # For memory large blocks are mapped one by one: the allocator's holes between them are none of a load's.
        for what, extra in (("seconds", {}), ("memory", {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)})):
            command = [sys.executable, __file__, "--ranks", str(directory), what]
            if code := subprocess.run(command, env=os.environ | extra).returncode:
                return code
            found |= json.loads((directory / f"{what}.json").read_text())
    print(json.dumps(found))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--plan-for-gpu", type=Path, metavar="FILE", help="write an 8B layout's local copies")
    parser.add_argument("--gpu", type=Path, metavar="FILE", help="time the copies of such a file on this GPU")
    parser.add_argument("--ranks", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        if options.ranks is not None:
            return launch(measure, options.ranks, RANKS, ["nla_megatron.rollout.preload"])
        if options.plan_for_gpu is not None:
            silence_libraries()
            write_local_copies(options.plan_for_gpu, QWEN3_8B, 2)
        elif options.gpu is not None:
            print(json.dumps(on_gpu(options.gpu)))
        else:
            return on_ranks()
    except NlaError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
