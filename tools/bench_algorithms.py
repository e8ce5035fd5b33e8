"""Whether every algorithm raises its reward: short runs of each on two tasks, over seeds, from a demo's models.

    make demo
    python tools/bench_algorithms.py                              # lexical and nla, resumable: the runs stay in --out
    python tools/bench_algorithms.py --tasks lexical --algorithms grpo rloo

Rewards of one step are those of its prompts, and these differ more from step to step than models learn in a few of
them. So each run is compared with one of the same seed, and so of the same prompts, in which nothing learns: its gain
is the mean over the last steps of its reward less that one's. (dapo alone draws others for prompts whose samples are
all worth the same.) The figure is the mean gain over seeds, with the
one-sided p-value of Student's t for no gain. On nla, where the reconstructor learns too, `policy_gain` is the same over
runs in which it learns alone. A table comes first; the last line is JSON: per task and algorithm `untrained`,
`trained`, `gain`, `p`, `policy_gain`, `policy_p`, `seeds`, and `all_significant`: every `p` is below 0.05.
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

LAST = 10
"""Steps at the end of a run whose rewards are compared."""
UNTRAINED, POLICY_ALONE_FROZEN = "untrained", "frozen_policy"
CONTROLS = {
    "lexical": {UNTRAINED: ["optim.lr=1e-12"]},
    "nla": {UNTRAINED: ["optim.lr=1e-12", "ar_optim.lr=1e-12"], POLICY_ALONE_FROZEN: ["optim.lr=1e-12"]},
}  # fmt: skip
"""By task, runs of grpo that show what is no learning, or not the policy's."""
COMMON = [
    "batch_size=8", "micro_batch_size=64", "save_every=1000", "export=false", "optim.schedule=constant",
    "critic_optim.lr=1e-3", "critic_optim.schedule=constant", "critic_optim.warmup_steps=0",
    "rollout.max_num_batched_tokens=4096", "logger.progress=false",
]  # fmt: skip


def arguments(task: str, demo: Path, samples: int | None) -> list[str]:
    """What a run of a task is told beside its algorithm and seed."""
    samples = samples or {"lexical": 4, "nla": 8}[task]
    if task == "lexical":
        return [
            "task=lexical", "reward=lexical", f"model={demo / 'pretrain' / 'hf'}", f"data={demo / 'corpus.parquet'}",
            f"samples_per_prompt={samples}", "rollout.max_new_tokens=32", "rollout.max_model_len=128", "optim.lr=3e-4",
            "optim.warmup_steps=0",
        ]  # fmt: skip
    return [
        f"av={demo / 'sft_av' / 'hf'}", f"ar={demo / 'sft_ar' / 'hf'}", f"data={demo / 'build' / 'rl.parquet'}",
        f"samples_per_prompt={samples}", "rollout.max_new_tokens=40", "rollout.max_model_len=256", "optim.lr=3e-4",
        "optim.warmup_steps=5", "ar_optim.lr=1e-4", "ar_optim.schedule=constant", "ar_optim.warmup_steps=2",
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


def last_rewards(sweep: Path, algorithm: str, seeds: int) -> list[float]:
    """The mean reward of the last steps, by seed."""
    found = []
    for run_dir in runs_of(sweep, algorithm, seeds):
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        found.append(statistics.mean(json.loads(line)["reward"] for line in lines[-LAST:]))
    return found


def measured(trained: list[float], controls: dict[str, list[float]]) -> dict[str, Any]:
    row: dict[str, Any] = {"trained": statistics.mean(trained), "seeds": len(trained)}
    for control, prefix in ((UNTRAINED, ""), (POLICY_ALONE_FROZEN, "policy_")):
        if control in controls:
            gains = [one - other for one, other in zip(trained, controls[control], strict=True)]
            row |= {f"{prefix}gain": statistics.mean(gains), f"{prefix}p": p_value(gains)}
    return {UNTRAINED: statistics.mean(controls[UNTRAINED]), **row}


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    head = ("task", "algorithm", "untrained", "trained", "gain", "p", "policy's gain", "p")
    lines = [head, ("---",) * len(head)]
    for task, found in results.items():
        for name, row in found.items():
            alone = [f"{row['policy_gain']:+.3f}", f"{row['policy_p']:.4f}"] if "policy_gain" in row else ["", ""]
            ends = [f"{row[UNTRAINED]:.3f}", f"{row['trained']:.3f}", f"{row['gain']:+.3f}", f"{row['p']:.4f}"]
            lines.append((task, name, *ends, *alone))
    return [f"| {' | '.join(cells)} |" for cells in lines]


def swept(out: Path, task: str, algorithms: list[str], options: argparse.Namespace, more: list[str]) -> int:
    return run([
        "rl", "-m", *arguments(task, options.demo, options.samples), *COMMON, *more,
        f"algorithm=choice({','.join(algorithms)})", f"seed=range({options.seeds})", f"steps={options.steps}",
        f"out={out}", f"sweep.jobs={options.jobs}",
    ])  # fmt: skip


def main() -> int:
    algorithms = sorted(path.stem for path in (conf_dir() / "algorithm").glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"))
    parser.add_argument("--out", type=Path, default=Path("runs/bench_algorithms"))
    parser.add_argument("--tasks", nargs="+", default=["lexical", "nla"], choices=["lexical", "nla"])
    parser.add_argument("--algorithms", nargs="+", default=algorithms, choices=algorithms)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--samples", type=int, help="a prompt; by default 4 on lexical and 8 on nla")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one core each")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds: at least 2, or there is no spread to test a gain against")
    results: dict[str, dict[str, Any]] = {}
    for task in options.tasks:
        sweeps = {name: (["grpo"], extra, options.out / f"{task}_{name}") for name, extra in CONTROLS[task].items()}
        sweeps[task] = (options.algorithms, [], options.out / task)
        for algorithms, extra, out in sweeps.values():
            if code := swept(out, task, algorithms, options, extra):
                return code
        controls = {name: last_rewards(sweeps[name][2], "grpo", options.seeds) for name in CONTROLS[task]}
        results[task] = {
            name: measured(last_rewards(options.out / task, name, options.seeds), controls)
            for name in options.algorithms
        }
    print(*table(results), sep="\n")
    significant = all(row["p"] < 0.05 for found in results.values() for row in found.values())
    print(json.dumps({**results, "all_significant": significant}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
