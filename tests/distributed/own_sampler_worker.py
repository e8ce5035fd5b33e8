"""A policy that writes its responses itself, on several layouts of two ranks.

Arguments: RESULT SCRATCH. Rank 0 writes what was written, and log-probs by a hooked transformers model.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from nla_megatron.config.compose import compose
from nla_megatron.parallel.collectives import barrier
from nla_megatron.parallel.world import initialise
from nla_megatron.training.rl import RlTrainer, check
from nla_megatron.types import Rollout, RolloutBatch
from tests.support import hooked
from tests.support.credited import PROMPTS, SAMPLES, overrides, write_files
from tests.support.tiny import tiny_mixture, tiny_model

LAYOUTS: dict[str, tuple[str, ...]] = {
    "tp2": ("parallel=tp2",),
    "pp2": ("parallel=pp2",),
    "dp2": ("parallel=dp2",),
    "tp2 sequence parallel": ("parallel=tp2", "parallel.sequence_parallel=true"),
    "ep2": ("parallel=ep2",),
}
MIXTURE = ("ep2",)
"""Layouts of a mixture of experts."""
# The policy writes no explanation, so all rewards are alike: an entropy bonus is what it learns from.
OWN = (
    "rollout.engine=policy", "rollout.max_new_tokens=9", "rollout.temperature=0.8", "steps=2", "micro_batch_size=2",
    "algorithm.entropy_coef=0.1",
)  # fmt: skip


def configured(folder: Path, layout: str, case: str, task: str, *more: str) -> Any:
    replaced = ("steps=", "micro_batch", "parallel=")
    words = [word for word in overrides(folder, layout, case, task) if not word.startswith(replaced)]
    return compose("rl", [*words, *LAYOUTS[layout], *OWN, *more])


def rows_of(batch: RolloutBatch) -> list[dict[str, Any]]:
    return [asdict(rollout) for rollout in batch.rollouts]


def first_like(layout: str) -> str:
    """The first layout of the same model."""
    return next(each for each in LAYOUTS if (each in MIXTURE) == (layout in MIXTURE))


def on_layout(scratch: Path, layout: str) -> dict[str, Any]:
    world = initialise(compose("rl", [*LAYOUTS[layout], "out=none"]).parallel)
    folder = scratch / first_like(layout)
    if world.is_main and not folder.exists():
        write_files(folder, tiny_mixture if layout in MIXTURE else tiny_model)
    barrier(world)
    config = configured(folder, layout, "grpo", "nla")
    check(config, world.size)
    trainer = RlTrainer(config, world)
    side, sampler = trainer.side, trainer.engine
    requests = side.requests(list(range(PROMPTS)), 0)
    drawn = sampler.generate(requests, side.vectors, SAMPLES)
    greedy = sampler.generate([replace(each, greedy=True) for each in requests], side.vectors, 1)
    asked = [requests[rollout.group] for rollout in drawn.rollouts]
    out: dict[str, Any] = {
        "drawn": rows_of(drawn), "greedy": rows_of(greedy),
        "scored": rows_of(sampler.score(drawn.rollouts, asked, side.vectors)),
        "again": rows_of(sampler.generate(requests, side.vectors, SAMPLES)),
        "steps": [trainer.step(number) for number in range(2)],
        "afterwards": rows_of(sampler.generate(requests, side.vectors, SAMPLES)),
    }  # fmt: skip
    # Adapters and sequence parallelism exclude each other, and experts have no adapters.
    lora = () if world.sequence_parallel else ("lora.rank=2", "lora.targets=[q_proj,o_proj]")
    adapted = RlTrainer(configured(folder, layout, "ppo projected", "nla", *lora), world)
    out["adapted"] = [adapted.step(number) for number in range(2)]
    plain = RlTrainer(configured(folder, layout, "grpo", "lexical", "rollout.top_k=1"), world)
    out |= stopped(plain.side, plain.engine)
    parallel_state.destroy_model_parallel()
    if world.is_main and layout == first_like(layout):
        out["expected"] = [by_hand(folder, side, rollout, 0.8) for rollout in drawn.rollouts]
        out["expected_greedy"] = [by_hand(folder, side, rollout, 1.0) for rollout in greedy.rollouts]
    return out


def stopped(side: Any, sampler: Any) -> dict[str, Any]:
    """Responses to plain prompts, and those that end where the first one of them has two tokens more than two."""
    prompts = side.requests(list(range(PROMPTS)), 0)
    free = sampler.generate(prompts, side.vectors, SAMPLES)
    stop = side.tokenizer.decode(free.rollouts[0].response_ids[2:4])
    sampler.config = replace(sampler.config, stop=[stop])
    return {"stop": stop, "free": rows_of(free), "stopped": rows_of(sampler.generate(prompts, side.vectors, SAMPLES))}


def by_hand(folder: Path, side: Any, rollout: Rollout, temperature: float) -> dict[str, Any]:
    """Log-probs of a response, and the likeliest tokens in its place, by transformers with one hook."""
    [intervention], vector = side.interventions, torch.from_numpy(side.vectors([rollout.row])[0])
    [position] = side.task.marker_positions
    model = hooked.Hooked(folder / "av")
    change = hooked.Change(
        intervention.layer, hooked.norm_add, vector, lambda t: intervention.strength if t == position else None
    )
    with torch.no_grad():
        rows = model.distributions(rollout.prompt_ids, rollout.response_ids, [change], temperature)
    picked = rows.gather(-1, torch.tensor(rollout.response_ids)[:, None])[:, 0]
    return {"logprobs": picked.tolist(), "likeliest": rows.argmax(-1).tolist()}


def main(result: str, scratch: str) -> None:
    found = {layout: on_layout(Path(scratch), layout) for layout in LAYOUTS}
    if torch.distributed.get_rank() == 0:
        Path(result).write_text(json.dumps(found))
    torch.distributed.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:3])
