"""A steered policy on four ranks against transformers with hooks, on every layout; checkpoints between layouts.

Arguments: RESULT SCRATCH. Rank 0 writes, per layout and case, the largest differences found.
"""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

from nla_megatron.config.schema import OptimConfig, ParallelConfig
from nla_megatron.models.logprobs import response_logprobs
from nla_megatron.parallel.collectives import barrier, gather_objects
from nla_megatron.parallel.world import World, initialise
from nla_megatron.training.checkpoint import Checkpoints
from nla_megatron.training.losses import cross_entropy
from nla_megatron.training.strengths import StrengthPolicy
from tests.support import strengths as by_hand
from tests.support.covering import chosen
from tests.support.strengths import CASES, LENGTHS, PROMPTS

LAYOUTS = {
    "dp4": ParallelConfig(),
    "tp2 dp2": ParallelConfig(tp=2),
    "pp2 dp2": ParallelConfig(pp=2),
    "tp2 pp2": ParallelConfig(tp=2, pp=2),
    "tp2 pp2 recomputed": ParallelConfig(tp=2, pp=2, recompute="full"),
    "tp2 pp2 sequence parallel recomputed": ParallelConfig(tp=2, pp=2, sequence_parallel=True, recompute="full"),
    "pp2 vpp2 dp2": ParallelConfig(pp=2, vpp=2),
}
WATCHED = ("tp2 pp2", "layers")


def _factors(run: tuple[str, str]) -> tuple[object, ...]:
    layout = LAYOUTS[run[0]]
    return (run[1], layout.tp, layout.pp, layout.vpp, layout.sequence_parallel, layout.recompute)


RUNS = chosen(product(LAYOUTS, CASES), _factors, [WATCHED])
"""Layouts, and what is predicted on them."""
LEARNING = OptimConfig(lr=3e-3, warmup_steps=0, schedule="constant", clip_grad=1.0)


def on_layout(name: str, world: World, directory: Path, sae: Path) -> dict[str, Any]:
    """Of every case: log-probs, gradients and whether all ranks have the same; what changed of the model."""
    out: dict[str, Any] = {}
    batch = by_hand.batch()
    loss = cross_entropy(float(batch.fields["mask"].sum()))
    for case in (case for layout, case in RUNS if layout == name):
        policy = by_hand.policy_of(case, directory, sae, world)
        before = by_hand.checksum(policy)
        logprobs = policy.rows(batch, response_logprobs(1.0), max(LENGTHS))
        done = policy.update(batch, loss, ("loss",), 0)
        gradients = {name: each.grad for name, each in policy.predictor.named_parameters() if each.grad is not None}
        everyone = gather_objects({name: each.numpy().tobytes() for name, each in gradients.items()}, world)
        prompts = [tuple(row[:prompt]) for row, prompt in zip(batch.ids, PROMPTS, strict=True)]
        out[case] = {
            "logprobs": logprobs, "gradients": gradients, "loss": done.statistics["loss"],
            "features": policy.features(prompts), "weights": policy.predictor.state_dict(),
            "masks": by_hand.masks_of(policy), "alike": all(each == everyone[0] for each in everyone),
            "unchanged": all(gather_objects(by_hand.checksum(policy) == before, world)),
        }  # fmt: skip
    return out


def learning(world: World, directory: Path, sae: Path) -> StrengthPolicy:
    return by_hand.policy_of("layers", directory, sae, world, LEARNING)


def losses(policy: StrengthPolicy, steps: range) -> list[float]:
    batch = by_hand.batch()
    loss = cross_entropy(float(batch.fields["mask"].sum()))
    return [policy.update(batch, loss, ("loss",), step).statistics["loss"] for step in steps]


def compare(numbers: dict[str, Any], reference: by_hand.ByHand, case: str) -> dict[str, Any]:
    wanted = reference.run(case, numbers["weights"], numbers["masks"])
    rows = [
        numbers["logprobs"][row, prompt - 1 : length - 1]
        for row, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True))
    ]
    return {
        "logprob": max(float((a - b).abs().max()) for a, b in zip(rows, wanted.logprobs, strict=True)),
        "gradient": by_hand.gradient_gap(numbers["gradients"], wanted.gradients),
        "features": float((numbers["features"] - wanted.features).abs().max()),
        "loss": abs(numbers["loss"] - wanted.loss),
        "alike": numbers["alike"],
        "unchanged": numbers["unchanged"],
    }


def main(result: str, scratch: str) -> None:
    from megatron.core import parallel_state

    found: dict[str, dict[str, Any]] = {}
    resumed: dict[str, Any] = {}
    for name, layout in LAYOUTS.items():
        world = initialise(layout)
        if world.is_main:
            by_hand.prepare(Path(scratch))
        barrier(world)
        directory, sae = Path(scratch) / "model", Path(scratch) / "sae"
        found[name] = on_layout(name, world, directory, sae)
        policy = learning(world, directory, sae)
        checkpoints = Checkpoints(Path(scratch) / "run", "rl", world, keep=2)
        if name == "dp4":
            resumed["straight"] = losses(policy, range(2))
            checkpoints.save(2, {"predictor": policy}, {}, {})
            resumed["straight"] += losses(policy, range(2, 5))
        else:
            checkpoints.resume({"predictor": policy}, {}, {})
            resumed[name] = losses(policy, range(2, 5))
        parallel_state.destroy_model_parallel()
    if world.is_main:
        reference = by_hand.ByHand(directory, sae)
        out: dict[str, Any] = {
            name: {case: compare(each, reference, case) for case, each in numbers.items()}
            for name, numbers in found.items()
        }
        out["resumed"] = resumed
        layout, case = WATCHED
        wrong = {**found[layout][case]}
        wrong["weights"] = {name: values * 1.01 for name, values in wrong["weights"].items()}
        out["wrong weights"] = compare(wrong, reference, case)
        Path(result).write_text(json.dumps(out, indent=1))
    barrier(world)


if __name__ == "__main__":
    main(*sys.argv[1:3])
