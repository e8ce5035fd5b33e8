"""A predictor learns on a planted task, with the real sampler: two features move a class of tokens that is rewarded.

Arguments: RESULT SCRATCH. Two ranks, each a replica of the sampler.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from nla_megatron.algorithms import make_algorithm
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
from nla_megatron.rewards import make_reward, register
from nla_megatron.rollout.engine import Engine
from nla_megatron.training.clock import PhaseClock
from nla_megatron.training.policy import PolicyLearning, means
from nla_megatron.training.sampling import Sampling
from nla_megatron.training.sides.sae import SaeSide
from nla_megatron.types import Measured, Rollout, Scores
from tests.support.strengths import checksum
from tests.support.tiny import tiny_model

RAISES, LOWERS, IDLE = 3, 5, 8
CLASS = range(300, 360)
STEPS = 12


@register("planted")
class Planted:
    """The share of a response's tokens that are of the class."""

    once = False

    def __init__(self, config: RewardConfig):
        self.config = config

    def __call__(self, measured: Measured, step: int) -> Scores:
        shares = [
            sum(token in CLASS for token in rollout.response_ids) / len(rollout.response_ids)
            for rollout in measured.rollouts
        ]
        return Scores(torch.tensor(shares))

    def state(self) -> dict[str, float]:
        return {}

    def load_state(self, state: dict[str, float]) -> None: ...


def plant(directory: Path, sae: Path) -> None:
    """A direction that the class's tokens have in common in the output layer, and an SAE of the last block in which one
    feature has that direction, another its opposite, and the others any.
    """
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(1)
    weights = load_file(directory / "model.safetensors")
    head = weights["model.embed_tokens.weight"]
    towards = torch.randn(head.shape[1], generator=generator)
    towards = towards / towards.norm()
    head[list(CLASS)] += 0.4 * towards
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    decoder = torch.randn(16, head.shape[1], generator=generator) / head.shape[1] ** 0.5
    decoder[RAISES], decoder[LOWERS] = towards, -towards
    sae.mkdir()
    config = {"architecture": "standard", "d_in": head.shape[1], "d_sae": 16, "apply_b_dec_to_input": False}
    (sae / "cfg.json").write_text(json.dumps(config))
    encoder = torch.randn(head.shape[1], 16, generator=generator) * 0.02
    tensors = {"W_enc": encoder, "b_enc": torch.zeros(16), "W_dec": decoder, "b_dec": torch.zeros(head.shape[1])}
    save_file(tensors, sae / "sae_weights.safetensors")


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
        optim=OptimConfig(lr=1e-2, warmup_steps=0, schedule="constant"), eval_every=STEPS, eval_rows=16,
        reward=RewardConfig(name="planted"), algorithm=AlgorithmConfig(kl_coef=0.001),
        rollout=RolloutConfig(max_new_tokens=12, max_model_len=128, max_num_seqs=32),
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
        words = ("river", "stone", "bread", "cloud", "winter", "paper", "music", "garden")
        lines = [{"prompt": f"The {one} and the {other}"} for one in words for other in words if one != other]
        (scratch / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    barrier(world)
    config = config_of(scratch)
    longest = SaeSide.check(config, world.size)
    side: Any = SaeSide(config, world)
    algorithm, reward = make_algorithm(config.algorithm), make_reward(config.reward)
    engine = Engine(
        side.directory, side.shape, config.rollout, side.interventions, world, int(side.tokenizer.eos_token_id), 0
    )
    sampling = Sampling(config, side, engine, algorithm, reward, world)
    learning = PolicyLearning(config, side, algorithm, None)
    before, steps = checksum(side.policy), []
    start = side.evaluate(engine, -1)
    for number in range(STEPS):
        scored = sampling.step(number, PhaseClock())
        sampled = learning.look(scored, number)
        learned = learning.update(scored.batch, sampled, algorithm.credit(sampled), number)
        beside = side.learn(scored.batch, scored.measured, number)
        steps.append({"reward": float(scored.scores.rewards.mean()), **means(learned.policy), **beside})
    # A replay scores what was sampled with the strengths that it was sampled with.
    fresh = engine.generate(side.requests(list(range(4)), number), side.vectors, 2, number).rollouts
    kept = [request.strengths for request in side.requests([rollout.row for rollout in fresh], number)]
    replayed = engine.score(fresh, [None] * len(fresh), side.vectors, number, kept).rollouts
    unsteered = engine.score(fresh, [None] * len(fresh), side.vectors, number).rollouts
    end = side.evaluate(engine, STEPS - 1)
    side.export()
    if world.is_main:
        prompts = [side.task.prompt_ids(row) for row in range(4)]
        exported, described = read_predictor(scratch / "run" / "predictor")
        gap = (exported(side.policy.features(prompts)) - side.policy.strengths(prompts, None)).abs().max()
        out = {
            "steps": steps, "start": start, "end": end, "unchanged": checksum(side.policy) == before,
            "replay gap": gap_of(fresh, replayed), "other strengths": gap_of(fresh, unsteered), "longest": longest,
            "exported gap": float(gap.detach()), "steers": described.interventions[0].to_dict(),
        }  # fmt: skip
        Path(result).write_text(json.dumps(out, indent=1))
    barrier(world)
    engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:3])
