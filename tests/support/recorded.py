"""Rollouts of a task as a run records them, written by hand: a toy model writes no explanation of its own."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from nla_megatron.tasks.nla import NlaTask
from nla_megatron.training.data_order import rows_of_step
from nla_megatron.types import Rollout

FAILED = (1, 3)
"""Group and sample of the one response that has no explanation."""


def record(run: Path, data: Path, av: Path, steps: int, prompts: int, samples: int, seed: int) -> Path:
    """What `rollout.replay` reads: real explanations, other rows' texts among them."""
    task = NlaTask.open(str(data), "rl", str(av))
    (run / "rollouts").mkdir(parents=True)
    for step in range(steps):
        rollouts = []
        for group, row in enumerate(rows_of_step(task.table.n_rows, prompts, step, seed)):
            for sample in range(samples):
                gold = task.gold_explanations[(row + 11 * sample) % task.table.n_rows]
                text = "no tags at all" if (group, sample) == FAILED else f"<explanation>\n{gold}\n</explanation>"
                ids = tuple(task.contract.av_response_ids(task.tokenizer, text))
                rollouts.append(Rollout(group, sample, row, task.prompt_ids, ids, (0.0,) * len(ids), text, True))
        lines = "".join(json.dumps(asdict(rollout)) + "\n" for rollout in rollouts)
        (run / "rollouts" / f"step_{step:08d}.jsonl").write_text(lines)
    return run
