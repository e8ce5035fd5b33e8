"""Every algorithm preset trains a tiny policy on one layout, by `rl`'s own trainer; only vLLM is left out.

Arguments: RESULT SCRATCH LAYOUT. Rank 0 writes the scalars of every step, by case and task. Exported weights, and what
the algorithm sees of one step more, are in the run's directory of each.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nla_megatron.config.compose import compose
from nla_megatron.parallel.collectives import barrier
from nla_megatron.parallel.world import World, initialise
from nla_megatron.training.clock import PhaseClock
from nla_megatron.training.rl import RlTrainer, check
from tests.support.credited import RUNS, SPREAD, STEPS, WrittenSampler, out_of, overrides, write_files


def trained(config: Any, world: World, out: Path) -> list[dict[str, float]]:
    """The scalars of each step but the clock's."""
    check(config, world.size)
    torch.manual_seed(config.seed)
    trainer = RlTrainer(config, world, WrittenSampler)
    steps = [trainer.step(number) for number in range(STEPS)]
    # With the weights of the end: log-probs of policy and reference, the critic's values, and what they are worth.
    sampled = trainer.learning.look(trainer.sampling.step(STEPS, PhaseClock()), STEPS)
    credit = trainer.algorithm.credit(sampled)
    trainer.side.export()
    if world.is_main:
        tensors = {**vars(sampled), "advantages": credit.advantages, "returns": credit.returns}
        save_file({name: each for name, each in tensors.items() if each is not None}, out / "sampled.safetensors")
    return [{name: value for name, value in step.items() if not name.startswith("seconds_")} for step in steps]


def main(result: str, scratch: str, layout: str) -> None:
    folder, found = Path(scratch), {}
    world = initialise(compose("rl", [f"parallel={layout}", f"out={scratch}"]).parallel)
    if world.is_main and not (folder / "prompts.jsonl").exists():
        write_files(folder)
    barrier(world)
    for case, task in RUNS if layout == "single" else [run for run, where in SPREAD if where == layout]:
        print(f"{task}: {case}", flush=True)
        config, out = compose("rl", overrides(folder, layout, case, task)), out_of(folder, layout, case, task)
        found[f"{case} {task}"] = trained(config, world, out)
    if world.is_main:
        Path(result).write_text(json.dumps(found))
    barrier(world)


if __name__ == "__main__":
    main(*sys.argv[1:4])
