"""Whether every algorithm raises its reward: short runs of each on two tasks, over seeds, from a demo's models.

    make demo
    python tools/bench_algorithms.py                              # lexical and nla, resumable: the runs stay in --out
    python tools/bench_algorithms.py --tasks lexical --algorithms grpo rloo

A run's gain is its mean reward over the last steps less that over the first. The figure of an algorithm on a task is
the mean gain over seeds, with the one-sided p-value of Student's t for a gain of 0. The row `frozen` is grpo with a
policy that stays as it is: what its reward gains is chance, and on nla the reconstructor's learning. A table comes
first; the last line is JSON: per task and algorithm `first`, `last`, `gain`, `p`, `seeds`, and `all_significant`:
every p is below 0.05, those of `frozen` aside.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np

from nla_megatron.config.compose import conf_dir
from nla_megatron.launch.commands import run

EDGE = 5
"""Steps at either end of a run that its gain compares."""
FROZEN = ["optim.lr=1e-12"]
COMMON = [
    "samples_per_prompt=4", "micro_batch_size=64", "save_every=1000", "export=false", "optim.schedule=constant",
    "optim.warmup_steps=0", "critic_optim.lr=1e-3", "critic_optim.schedule=constant", "critic_optim.warmup_steps=0",
    "rollout.max_num_batched_tokens=4096", "logger.progress=false",
]  # fmt: skip


def arguments(task: str, demo: Path) -> list[str]:
    """What a run of a task is told beside its algorithm and seed."""
    if task == "lexical":
        return [
            "task=lexical", "reward=lexical", f"model={demo / 'pretrain' / 'hf'}", f"data={demo / 'corpus.parquet'}",
            "batch_size=8", "rollout.max_new_tokens=32", "rollout.max_model_len=128", "optim.lr=3e-4",
        ]  # fmt: skip
    return [
        f"av={demo / 'sft_av' / 'hf'}", f"ar={demo / 'sft_ar' / 'hf'}", f"data={demo / 'build' / 'rl.parquet'}",
        "batch_size=8", "rollout.max_new_tokens=40", "rollout.max_model_len=256", "optim.lr=3e-4", "ar_optim.lr=5e-4",
    ]  # fmt: skip


def p_value(gains: list[float]) -> float:
    """One-sided, that the mean is 0 or less; the density of Student's t is integrated numerically."""
    spread = statistics.stdev(gains)
    if spread == 0:
        return 0.0 if gains[0] > 0 else 1.0
    freedom = len(gains) - 1
    t = statistics.mean(gains) / (spread / math.sqrt(len(gains)))
    x = np.linspace(0.0, abs(t), 100_001)
    scale = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    inside = float(np.trapezoid(scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2), x))
    return 0.5 - math.copysign(inside, t)


def runs_of(sweep: Path, algorithm: str, seeds: int) -> list[Path]:
    jobs = json.loads((sweep / "sweep.json").read_text())["jobs"]
    wanted = [{"algorithm": algorithm, "seed": str(seed)} for seed in range(seeds)]
    return [Path(job["out"]) for job in jobs if job["overrides"] in wanted]


def rewards(directory: Path) -> list[float]:
    return [json.loads(line)["reward"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def measured(runs: list[Path]) -> dict[str, Any]:
    ends = [(statistics.mean(found[:EDGE]), statistics.mean(found[-EDGE:])) for found in map(rewards, runs)]
    gains = [last - first for first, last in ends]
    return {
        "first": statistics.mean(first for first, _ in ends), "last": statistics.mean(last for _, last in ends),
        "gain": statistics.mean(gains), "p": p_value(gains), "seeds": len(gains),
    }  # fmt: skip


def main() -> int:
    algorithms = sorted(path.stem for path in (conf_dir() / "algorithm").glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"))
    parser.add_argument("--out", type=Path, default=Path("runs/bench_algorithms"))
    parser.add_argument("--tasks", nargs="+", default=["lexical", "nla"], choices=["lexical", "nla"])
    parser.add_argument("--algorithms", nargs="+", default=algorithms, choices=algorithms)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    for task in options.tasks:
        results[task] = {}
        for algorithms, extra, suffix in ((options.algorithms, [], ""), (["grpo"], FROZEN, "_frozen")):
            out = options.out / (task + suffix)
            code = run([
                "rl", "-m", *arguments(task, options.demo), *COMMON, *extra, f"steps={options.steps}",
                f"algorithm=choice({','.join(algorithms)})", f"seed=range({options.seeds})", f"out={out}",
            ])  # fmt: skip
            if code:
                return code
            for name in algorithms:
                found = measured(runs_of(out, name, options.seeds))
                results[task]["frozen" if suffix else name] = found
    print("| task | algorithm | first steps | last steps | gain | p |\n|---|---|---|---|---|---|")
    for task, found in results.items():
        for name, row in found.items():
            print(f"| {task} | {name} | {row['first']:.3f} | {row['last']:.3f} | {row['gain']:+.3f} | {row['p']:.4f} |")
    significant = all(row["p"] < 0.05 for found in results.values() for row in found.values())
    print(json.dumps({**results, "all_significant": significant}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
