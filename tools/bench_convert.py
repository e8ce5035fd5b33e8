"""Measure checkpoint conversion on this machine, in one process: `python tools/bench_convert.py [DIRECTORY]`.

A random model of about 1 GB (Qwen3's shape, bfloat16) is imported and exported, against `cat` copying the files that
are read to one other file: in turns in the same run, everything read before, the median over pairs, imports and
start-up left out. The last line is JSON:

    import_rate_over_copy           bytes per second of HF -> torch_dist over those of `cat`; at least 0.5. Neither side
                                    waits for the disk here, because `cat` never does
    export_rate_over_copy           the same of torch_dist -> HF; at least 0.5
    import_rate_over_copy_on_disk   the same where both sides wait until the disk has all of it, as the command does:
                                    conversion as it is by default, over `cat` and an fsync of the copy
    export_rate_over_copy_on_disk   the same of torch_dist -> HF
    roundtrip_exact                 every tensor of the export has the bits of the original
    peak_extra_over_largest_tensor  the peak of resident memory above what the process had before, of the larger of the
                                    two conversions, in units of the largest Hugging Face tensor. Tensors are written at
                                    their place in a shard, so there is no shard buffer, and the floor "at most twice
                                    the largest tensor and one shard buffer" is: at most 2
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from nla_megatron.config.schema import ParallelConfig
from nla_megatron.conversion.exporting import Export
from nla_megatron.conversion.families import family_of, rules_of
from nla_megatron.conversion.families.qwen3 import config_from_shape
from nla_megatron.conversion.hf import SHARD_BYTES, SafetensorsReader, write_shards
from nla_megatron.conversion.importing import Import
from nla_megatron.conversion.safetensors_file import TensorSpec
from nla_megatron.launch.commands import silence_libraries
from nla_megatron.parallel.world import World, initialise
from nla_megatron.types import ModelShape

SHAPE = ModelShape(
    family="Qwen3ForCausalLM", num_layers=28, hidden_size=1024, ffn_hidden_size=3072, num_heads=16, num_kv_heads=8,
    head_dim=128, vocab_size=32_000, rope_theta=1e6, norm_eps=1e-6, tied_embeddings=False, qk_norm=True,
    max_positions=4096,
)  # fmt: skip
REPEATS, REPEATS_ON_DISK = 9, 4


def make_model(directory: Path) -> list[TensorSpec]:
    """Write the random model; returns its tensors."""
    directory.mkdir()
    config = {**config_from_shape(SHAPE), "dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(config))
    assert family_of(config).shape_from_config(config) == SHAPE
    rules = [rule for rule in rules_of(SHAPE, with_head=True) if not rule.alias]
    specs = [TensorSpec(part.hf, torch.bfloat16, rule.hf_shape(part)) for rule in rules for part in rule.parts]
    generator = torch.Generator().manual_seed(0)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for spec in specs:
            bits = torch.randint(-(2**15), 2**15, spec.shape, dtype=torch.int16, generator=generator)
            yield spec.name, bits.view(torch.bfloat16)

    write_shards(directory, tensors(), SHARD_BYTES, specs)
    return specs


def seconds(work: Callable[[], None]) -> float:
    # What earlier writes and removals left to the disk is not this one's time.
    os.sync()
    time.sleep(1)
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def copying(files: list[Path], target: Path, durable: bool) -> float:
    def work() -> None:
        with target.open("wb") as out:
            subprocess.run(["cat", *files], stdout=out, check=True)
            if durable:
                os.fsync(out.fileno())

    spent = seconds(work)
    target.unlink()
    return spent


def peak_extra(work: Callable[[], None]) -> int:
    """Bytes of resident memory that `work` takes at most above what the process has."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident now
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def same(one: Path, other: Path) -> bool:
    readers = [SafetensorsReader(path) for path in (one, other)]
    bits = ([reader.whole(name).view(torch.uint8) for reader in readers] for name in sorted(readers[0].names()))
    return readers[0].names() == readers[1].names() and all(torch.equal(a, b) for a, b in bits)


def measure(scratch: Path, world: World) -> dict[str, float | bool]:
    hf, mcore, back = (scratch / name for name in ("hf", "mcore", "back"))
    specs = make_model(hf)

    def importing(durable: bool) -> None:
        Import(hf, mcore, shard_bytes=SHARD_BYTES, durable=durable).run(world)

    def exporting(durable: bool) -> None:
        Export(mcore, None, back, world, shard_bytes=SHARD_BYTES, durable=durable).run(world)

    peak = max(peak_extra(lambda: importing(True)), peak_extra(lambda: exporting(True)))
    exact = same(hf, back)
    sources = {"import": sorted(hf.glob("*.safetensors")), "export": sorted((mcore / "weights").glob("*.distcp"))}
    times: dict[tuple[str, bool], list[float]] = defaultdict(list)
    for number, durable in enumerate([False] * REPEATS + [True] * REPEATS_ON_DISK):
        for name, made, work in (("export", back, exporting), ("import", mcore, importing)):
            shutil.rmtree(made)

            def copy(name: str = name, durable: bool = durable) -> float:
                return copying(sources[name], scratch / "copy", durable)

            def convert(work: Callable[[bool], None] = work, durable: bool = durable) -> float:
                return seconds(lambda: work(durable))

            # Who goes first finds another state of the machine's memory: they take turns.
            for kind, run in sorted([("copy ", copy), ("", convert)], reverse=bool(number % 2)):
                times[kind + name, durable].append(run())
    size = sum(spec.nbytes for spec in specs)
    median = {key: statistics.median(values) for key, values in times.items()}
    for (name, durable), value in sorted(median.items(), key=lambda one: one[0][::-1]):
        each = ", ".join(f"{one:.2f}" for one in times[name, durable])
        print(f"{name:<12}{' on disk' if durable else '':<9}{value:6.2f} s  {size / value / 1e9:5.2f} GB/s  ({each})")
    rates = {
        f"{name}_rate_over_copy{'_on_disk' if durable else ''}": round(
            statistics.median(
                copy / own for copy, own in zip(times[f"copy {name}", durable], times[name, durable], strict=True)
            ),
            3,
        )
        for durable in (False, True)
        for name in ("import", "export")
    }
    return {
        **rates,
        "roundtrip_exact": exact,
        "peak_extra_over_largest_tensor": round(peak / max(spec.nbytes for spec in specs), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", help="where about 4 GB may be written for a while")
    place = parser.parse_args().directory
    silence_libraries()
    world = initialise(ParallelConfig())
    with tempfile.TemporaryDirectory(dir=place) as scratch:
        print(json.dumps(measure(Path(scratch), world)))


if __name__ == "__main__":
    main()
