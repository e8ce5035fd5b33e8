"""What the demo measures, over seeds: runs of `nla-megatron demo`, one after the other.

    python tools/bench_demo.py                             # seeds 0, 1 and 2, resumable: the runs stay in --out
    python tools/bench_demo.py --seeds 0 --out runs/other stages.rl='[...]'
    python tools/held_to.py avx2 python tools/bench_demo.py --seeds 0 --out runs/avx2

What follows the options are keys of `demo`. A table comes first; the last line is JSON. Under `seeds` each seed has
`fve_sft` and `fve_rl` with its interval, `fve_gain`, the controls `fve_shuffled`, `fve_gold_text` (the trained AR on
gold text) and `fve_gold_text_sft`, `seconds` in all, and `cpu_seconds` of all processes of the run. Of the whole there
are `worst` (the lowest `fve_rl`), its seed, and `floors_met`. A run that was interrupted counts the processor's time of
its last part alone. The machine should have nothing else to do: beside other work the seconds say little, and half of
`cpu_seconds` is about what two idle cores take.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

FLOORS = {"fve_rl": 0.40, "seconds": 900.0}
"""At least, of the worst seed; at most, of the slowest, where the machine is otherwise idle."""
FIGURES = (
    "fve_sft", "fve_rl", "fve_rl_ci95", "fve_gain", "fve_gain_ci95", "fve_shuffled", "fve_gold_text",
    "fve_gold_text_sft", "logprob_gap_max",
)  # fmt: skip
CPU_FILE = "cpu_seconds.json"


def session_seconds(session: int) -> dict[int, float]:
    """Processor seconds so far of each living process of a session, by its id."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[3]) == session:
            found[int(entry.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


def run_demo(out: Path, seed: int, overrides: list[str]) -> int:
    """One demo in a session of its own, and the processor's time of all it starts beside its summary."""
    command = [sys.executable, "-m", "nla_megatron", "demo", f"out={out}", f"seed={seed}", *overrides]
    process = subprocess.Popen(command, start_new_session=True, stdout=sys.stderr)
    spent: dict[int, float] = {}
    try:
        while process.poll() is None:
            spent |= session_seconds(process.pid)
            time.sleep(1)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if process.returncode == 0 and not (out / CPU_FILE).exists():
        (out / CPU_FILE).write_text(json.dumps(sum(spent.values())))
    return process.returncode


def measured(out: Path) -> dict[str, Any]:
    """The figures of a finished run."""
    summary = json.loads((out / "summary.json").read_text())
    cpu = out / CPU_FILE
    return {
        **{name: summary[name] for name in FIGURES},
        "injected_all": summary["injected"] == summary["expected_injections"],
        "seconds": summary["seconds"]["total"],
        "cpu_seconds": round(json.loads(cpu.read_text())) if cpu.exists() else None,
    }


def table(seeds: dict[int, dict[str, Any]]) -> list[str]:
    head = ("seed", "after SFT", "after RL", "95 % interval", "shuffled", "gold text", "seconds", "CPU seconds")
    lines = [head, ("---",) * len(head)]
    for seed, row in seeds.items():
        low, high = row["fve_rl_ci95"]
        lines.append((
            str(seed), f"{row['fve_sft']:.3f}", f"{row['fve_rl']:.3f}", f"{low:.3f} to {high:.3f}",
            f"{row['fve_shuffled']:.3f}", f"{row['fve_gold_text_sft']:.3f}, {row['fve_gold_text']:.3f}",
            f"{row['seconds']:.0f}", str(row["cpu_seconds"]),
        ))  # fmt: skip
    return [f"| {' | '.join(cells)} |" for cells in lines]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/bench_demo"))
    parser.add_argument("overrides", nargs="*", help="keys of the demo")
    options = parser.parse_intermixed_args()
    found: dict[int, dict[str, Any]] = {}
    for seed in options.seeds:
        out = options.out / f"seed_{seed}"
        if code := run_demo(out, seed, options.overrides):
            return code
        found[seed] = measured(out)
        print("\n".join(table(found)), file=sys.stderr, flush=True)
    worst = min(found, key=lambda seed: float(found[seed]["fve_rl"]))
    met = {
        "fve_rl": found[worst]["fve_rl"] >= FLOORS["fve_rl"],
        "seconds": max(row["seconds"] for row in found.values()) <= FLOORS["seconds"],
    }
    print(json.dumps({"seeds": found, "worst": found[worst]["fve_rl"], "worst_seed": worst, "floors_met": met}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
