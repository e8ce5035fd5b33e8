"""A predictor learns on a planted task, with the real sampler: two features move a class of tokens that is rewarded.

Arguments: RESULT SCRATCH. Two ranks, each a replica of the sampler.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from nla_megatron.config.schema import (
    AlgorithmConfig,
    OptimConfig,
    ParallelConfig,
    RewardConfig,
    RlConfig,
    RolloutConfig,
    TaskConfig,
)
from nla_megatron.conversion.hf import read_shape
from nla_megatron.models.strength_files import read_predictor
from nla_megatron.parallel.collectives import barrier
from nla_megatron.parallel.world import initialise
from nla_megatron.training.rl import RlTrainer, check
from nla_megatron.types import Rollout
from tests.support.planted import IDLE, LOWERS, RAISES, plant, write_prompts
from tests.support.strengths import checksum
from tests.support.tiny import tiny_model

STEPS = 12


def config_of(scratch: Path) -> RlConfig:
    steering = {
        "layer": read_shape(scratch / "model").num_layers - 1, "where": "all", "sae": str(scratch / "sae"),
        "features": [RAISES, LOWERS, IDLE],
    }  # fmt: skip
    options = {
        "interventions": [steering],
        "predictor": {"hidden": 32, "initial_strength": 0.0},
        "prompts": {"name": "lexical", "options": {"held_out_fraction": 0.3}},
        "compare_samples": 2,
    }
    return RlConfig(
        out=str(scratch / "run"), task=TaskConfig("sae", options), model=str(scratch / "model"),
        data=str(scratch / "prompts.jsonl"), steps=STEPS, batch_size=8, samples_per_prompt=8, micro_batch_size=16,
        reward=RewardConfig(terms={"planted": {"term": "tests.support.planted:share_of_class"}}),
        optim=OptimConfig(lr=3e-3, warmup_steps=0, schedule="constant"), eval_every=STEPS, eval_rows=16,
        algorithm=AlgorithmConfig(kl_coef=0.001),
        rollout=RolloutConfig(max_new_tokens=12, max_model_len=128, max_num_seqs=32, cpu_kv_cache_gib=0.1),
    )  # fmt: skip


def gap_of(one: tuple[Rollout, ...], other: tuple[Rollout, ...]) -> float:
    """Largest difference of the sampler's log-probs."""
    pairs = [(a, b) for r, s in zip(one, other, strict=True) for a, b in zip(r.logprobs, s.logprobs, strict=True)]
    return max(abs(a - b) for a, b in pairs)


def main(result: str, folder: str) -> None:
    world, scratch = initialise(ParallelConfig()), Path(folder)
    if world.is_main:
        tiny_model(scratch / "model")
        plant(scratch / "model", scratch / "sae")
        write_prompts(scratch / "prompts.jsonl")
    barrier(world)
    config = config_of(scratch)
    check(config, world.size)
    trainer = RlTrainer(config, world)
    side: Any = trainer.side
    engine = trainer.engine
    before = checksum(side.policy)
    start = side.evaluate(engine, -1)
    steps = [trainer.step(number) for number in range(STEPS)]
    # A replay scores what was sampled with the strengths that it was sampled with.
    fresh = engine.generate(side.requests(list(range(4)), STEPS), side.vectors, 2).rollouts
    asked = side.requests([rollout.row for rollout in fresh], STEPS)
    replayed = engine.score(fresh, asked, side.vectors).rollouts
    unsteered = engine.score(fresh, [replace(each, strengths=None) for each in asked], side.vectors).rollouts
    side.export()
    if world.is_main:
        prompts = [side.task.prompt_ids(row) for row in range(4)]
        exported, described = read_predictor(scratch / "run" / "predictor")
        gap = (exported(side.policy.features(prompts)) - side.policy.strengths(prompts, None)).abs().max()
        out = {
            "steps": steps, "start": start, "unchanged": checksum(side.policy) == before,
            "replay gap": gap_of(fresh, replayed), "other strengths": gap_of(fresh, unsteered),
            "exported gap": float(gap.detach()), "steers": described.interventions[0].to_dict(),
        }  # fmt: skip
        Path(result).write_text(json.dumps(out, indent=1))
    barrier(world)
    engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:3])
