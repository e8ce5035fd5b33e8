"""Measure LoRA on 4-bit weights against LoRA on the weights as they are, on this machine: `python tools/bench_lora.py`.

A random model of about 100 M parameters (Qwen3's shape), adapters of rank 16 on all linear layers. Memory is of a
process that only loads; steps of both models, in fp32, take turns in one process, after one of each to warm up.
Medians; ratios are of pairs. The last line is JSON:

    load                  by dtype of training, of the weights as they are and with `lora.quantize=nf4`:
      held_bytes          of the base's weights, adapters left out
      peak_bytes          the peak of resident memory while the model is built and loaded, above what the process had
      bits_per_weight     of the quantised layers alone
    step_seconds          an update of the adapters: forward, backward and AdamW
    step_ratio            seconds of a step, nf4 over as it is; step_ratio_range over the pairs
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nla_megatron.config.schema import LoraConfig, OptimConfig, ParallelConfig
from nla_megatron.conversion.families import rules_of
from nla_megatron.conversion.families.qwen3 import config_from_shape
from nla_megatron.conversion.hf import SHARD_BYTES, read_shape, write_shards
from nla_megatron.conversion.live import load_from_hf, quantized
from nla_megatron.conversion.safetensors_file import TensorSpec
from nla_megatron.launch.commands import silence_libraries
from nla_megatron.models.batching import Batch, response_mask
from nla_megatron.models.quantized import NF4, NONE
from nla_megatron.models.verbalizer import build_verbalizer
from nla_megatron.parallel.world import World, initialise
from nla_megatron.training.lora import adapt
from nla_megatron.training.losses import cross_entropy
from nla_megatron.training.module import TrainModule
from nla_megatron.types import ModelShape

SHAPE = ModelShape(
    family="Qwen3ForCausalLM", num_layers=14, hidden_size=768, ffn_hidden_size=2048, num_heads=12, num_kv_heads=4,
    head_dim=64, vocab_size=16_384, rope_theta=1e6, norm_eps=1e-6, tied_embeddings=True, qk_norm=True,
    max_positions=512,
)  # fmt: skip
KINDS, DTYPES = (NONE, NF4), ("bfloat16", "float32")
ROWS, TOKENS, LOADS = 4, 64, 3


def make_model(directory: Path) -> None:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**config_from_shape(SHAPE), "dtype": "bfloat16"}))
    torch.manual_seed(0)
    parts = [(rule, part) for rule in rules_of(SHAPE, with_head=True) if not rule.alias for part in rule.parts]
    specs = [TensorSpec(part.hf, torch.bfloat16, rule.hf_shape(part)) for rule, part in parts]
    tensors = ((one.name, torch.randn(one.shape).mul(0.02).bfloat16()) for one in specs)
    write_shards(directory, tensors, SHARD_BYTES, specs)


def load(directory: Path, world: World, dtype: str, kind: str) -> Any:
    shape = read_shape(directory)
    model = build_verbalizer(shape, world, dtype, kind)
    load_from_hf(model, str(directory), shape, world, with_head=True)
    return model


def resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def loading(directory: Path, dtype: str, kind: str) -> None:
    """One load, in a process of its own; prints what it found as JSON."""
    world = initialise(ParallelConfig())
    # What is imported late is paid for by both.
    import bitsandbytes  # noqa: F401

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident now
    before = resident("VmRSS")
    model = load(directory, world, dtype, kind)
    peak = resident("VmHWM") - before
    held = [*model.parameters(), *model.buffers()]
    packed = quantized(model).values()
    bits = sum(8 * (one.codes.nbytes + one.scales.nbytes) for one in packed)
    weights = sum(one.weight_like.numel() for one in packed)
    found = {"peak": peak, "held": sum(one.nbytes for one in held), "bits": bits / weights if weights else None}
    print(json.dumps(found))


def loads(directory: Path, dtype: str) -> dict[str, Any]:
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for number in range(LOADS):
        for kind in KINDS[:: -1 if number % 2 else 1]:
            words = [sys.executable, __file__, "--load", str(directory), dtype, kind]
            # What is freed goes back to the kernel: else the peak is of the allocator's holes, in both.
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
            done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            found[kind].append(json.loads(done.stdout.splitlines()[-1]))
    return {
        kind: {
            "held_bytes": ones[0]["held"],
            "bits_per_weight": ones[0]["bits"],
            "peak_bytes": int(statistics.median(one["peak"] for one in ones)),
        }  # fmt: skip
        for kind, ones in found.items()
    }


def steps(directory: Path, world: World, repeats: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    ids = rng.integers(3, SHAPE.vocab_size, (ROWS, TOKENS)).tolist()
    batch = Batch(ids=ids, fields={"mask": response_mask([1] * ROWS, [TOKENS] * ROWS, TOKENS)})
    loss = cross_entropy(float(batch.fields["mask"].sum()))
    modules = {}
    for kind in KINDS:
        model = load(directory, world, "float32", kind)
        adapt(model, LoraConfig(rank=16), world, seed=0)
        modules[kind] = TrainModule(model, world, OptimConfig(), repeats + 1, ROWS, "float32")
        modules[kind].update(batch, loss, ("loss",), 0)
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(repeats):
        # Who goes first finds another state of the machine: they take turns.
        for kind in KINDS[:: -1 if number % 2 else 1]:
            start = time.perf_counter()
            modules[kind].update(batch, loss, ("loss",), number + 1)
            times[kind].append(time.perf_counter() - start)
    ratios = [one / other for one, other in zip(times[NF4], times[NONE], strict=True)]
    return {
        "step_seconds": {kind: round(statistics.median(ones), 3) for kind, ones in times.items()},
        "step_ratio": round(statistics.median(ratios), 3),
        "step_ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="pairs of steps")
    parser.add_argument("--load", nargs=3, metavar=("DIRECTORY", "DTYPE", "KIND"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    silence_libraries()
    if options.load:
        directory, dtype, kind = options.load
        return loading(Path(directory), dtype, kind)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "model"
        make_model(directory)
        # Who initialises is rank 0 of a world for itself and for its children: they come first.
        found: dict[str, Any] = {"load": {dtype: loads(directory, dtype) for dtype in DTYPES}}
        world = initialise(ParallelConfig())
        found |= steps(directory, world, options.repeats)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
