"""An AR that pools, projects, drops and regularises, on layouts of four ranks; its checkpoints and its export.

Arguments: RESULT SCRATCH. Rank 0 writes, per layout, what it computed, and what plain torch makes of the export.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from nla_megatron.config.schema import ArLossConfig, OptimConfig, ParallelConfig
from nla_megatron.contract.blocks import ReconstructorSpec
from nla_megatron.conversion.hf import HEAD_FILE, read_shape
from nla_megatron.conversion.live import load_reconstructor
from nla_megatron.models.batching import Batch
from nla_megatron.models.pipeline import Collect
from nla_megatron.parallel.collectives import barrier
from nla_megatron.parallel.world import World, initialise
from nla_megatron.tasks.nla import squared_error
from nla_megatron.training.checkpoint import Checkpoints
from nla_megatron.training.export import export
from nla_megatron.training.losses import make_reconstruction_loss
from nla_megatron.training.module import TrainModule
from nla_megatron.types import Microbatch
from tests.support.tiny import tiny_model

LAYOUTS = {
    "tp1 pp1": ParallelConfig(),
    "tp2 pp2": ParallelConfig(tp=2, pp=2),
    "tp2 sequence parallel": ParallelConfig(tp=2, sequence_parallel=True),
    "tp2 pp2 sequence parallel recomputed": ParallelConfig(tp=2, pp=2, sequence_parallel=True, recompute="full"),
}
SPECS = {
    "weighted": ReconstructorSpec("weighted", 3, 0.25, layer=2),
    "mean": ReconstructorSpec("mean", 1, layer=1),
    "max": ReconstructorSpec("max", 2, layer=3),
}
LENGTHS, STEPS, SAVED = (9, 14, 7, 11, 12, 8, 10), 3, 2
OPTIM = OptimConfig(lr=1e-3, warmup_steps=0, schedule="constant", clip_grad=0.5)
LOSS = ArLossConfig("smooth_l1", weight=0.7, l2_reg=0.01, variance_reg=0.5)


def targets(directory: Path) -> Batch:
    shape, rng = read_shape(directory), np.random.default_rng(7)
    vectors = rng.standard_normal((len(LENGTHS), shape.hidden_size)).astype(np.float32) * 5
    ids = [rng.integers(3, shape.vocab_size, length).tolist() for length in LENGTHS]
    return Batch(ids=ids, vectors=lambda rows: vectors[list(rows)])


def module(directory: Path, world: World, spec: ReconstructorSpec) -> TrainModule:
    assert spec.layer is not None
    shape = read_shape(directory).truncated(spec.layer + 1)
    model = load_reconstructor(str(directory), shape, world, "float32", spec, seed=5)
    return TrainModule(model, world, OPTIM, STEPS, 2, "float32")


def column(number: int) -> Collect:
    """One of the numbers that the AR predicts."""

    def collect(predicted_BD: Tensor, part: Microbatch) -> Tensor:
        return predicted_BD[:, number]

    return collect


def learned(made: TrainModule, batch: Batch, steps: range) -> list[list[float]]:
    loss = make_reconstruction_loss(LOSS)
    done = [loss.update(made, batch, step) for step in steps]
    return [[each.statistics["loss"], each.statistics["mse"], each.grad_norm] for each in done]


def on_layout(directory: Path, scratch: Path, name: str, layout: str, world: World) -> dict[str, Any]:
    batch, spec = targets(directory), SPECS[name]
    made = module(directory, world, spec)
    start = made.rows(batch, squared_error).tolist()
    run = scratch / f"{name} {layout}"
    steps = learned(made, batch, range(SAVED))
    Checkpoints(run, "sft ar", world, 1).save(SAVED, {"ar": made}, {}, {})
    steps += learned(made, batch, range(SAVED, STEPS))
    export(made.model, str(directory), run / "hf", world)
    return {"start": start, "steps": steps, "first": made.rows(batch, column(0)).tolist()}


def resumed(directory: Path, scratch: Path, name: str, saved_on: str, world: World) -> list[list[float]]:
    """The last step, from a checkpoint of another layout."""
    made = module(directory, world, SPECS[name])
    found = Checkpoints(scratch / f"{name} {saved_on}", "sft ar", world, 1).resume({"ar": made}, {}, {})
    assert found == SAVED
    return learned(made, targets(directory), range(SAVED, STEPS))


@torch.no_grad()
def by_torch(directory: Path, exported: Path, spec: ReconstructorSpec) -> list[float]:
    """The first number that the exported AR predicts of each row, without the package's models."""
    from transformers import AutoModel

    backbone: Any = AutoModel.from_pretrained(exported, dtype=torch.float32, attn_implementation="eager").eval()
    backbone.norm = torch.nn.Identity()
    head, found = load_file(exported / HEAD_FILE), []
    for row in targets(directory).ids:
        stream_TD = backbone(torch.tensor([list(row)])).last_hidden_state[0]
        if spec.pooling == "weighted":
            vector = head["position_logits"][: len(row)].softmax(0) @ stream_TD
        else:
            vector = stream_TD.mean(0) if spec.pooling == "mean" else stream_TD.max(dim=0).values
        for number in range(spec.projection_layers - 1):
            key = f"hidden.{number}"
            vector = F.linear(vector, head[f"{key}.linear.weight"], head[f"{key}.linear.bias"])
            vector = F.layer_norm(vector, vector.shape, head[f"{key}.norm.weight"], head[f"{key}.norm.bias"]).relu()
        found.append(float((head["weight"] @ vector)[0]))
    return found


def main(result: str, scratch: str) -> None:
    from megatron.core import parallel_state

    directory, place, out = Path(scratch) / "base", Path(scratch), {}
    for layout, config in LAYOUTS.items():
        world = initialise(config)
        if world.is_main and not directory.exists():
            tiny_model(directory, num_layers=5, vocab_size=1000)
        barrier(world)
        for name in SPECS:
            found: dict[str, Any] = on_layout(directory, place, name, layout, world)
            if layout == "tp2 pp2":
                found["resumed"] = resumed(directory, place, name, "tp1 pp1", world)
            if world.is_main:
                found["by torch"] = by_torch(directory, place / f"{name} {layout}" / "hf", SPECS[name])
            out[f"{name} {layout}"] = found
            barrier(world)
        parallel_state.destroy_model_parallel()
    if world.is_main:
        Path(result).write_text(json.dumps(out))
    barrier(world)


if __name__ == "__main__":
    main(*sys.argv[1:3])
