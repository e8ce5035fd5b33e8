"""Run directories as a command leaves them, made without running it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nla_megatron.config.compose import compose
from nla_megatron.config.run_directory import claim_run_directory, mark_done


def left_run(
    out: Path, *overrides: str, metrics: Sequence[dict[str, Any]] = (), figures: dict[str, Any] | None = None,
    finished: bool = True, command: str = "rl",
) -> Path:  # fmt: skip
    """The directory of a run with these overrides, with what it logged and its own `eval.json`."""
    inputs = {"rl": ["av=av", "ar=ar", "data=rl.parquet"], "pretrain": ["corpus=corpus.parquet", "tokenizer=tokenizer"]}
    config = compose(command, [*inputs[command], f"out='{out}'", *overrides])
    claim_run_directory(command, config)
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    if figures is not None:
        (out / "eval.json").write_text(json.dumps(figures))
    if finished:
        mark_done(config)
    return out


def learning(rate: float, seed: int, steps: int = 30) -> list[dict[str, Any]]:
    """Scalars of a run that learns, the faster the higher its rate, with some noise of its seed."""
    rows = []
    for step in range(steps):
        noise = 0.03 * math.sin(7 * step + 3 * seed)
        row = {"step": step, "reward": -2 + 1.5 * (1 - math.exp(-rate * 1e3 * step / 20)) + noise, "kl": rate * step}
        rows.append(row | ({"eval_fve": row["reward"] + 1} if step % 5 == 4 else {}))
    return rows
