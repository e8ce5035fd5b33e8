"""Every family on the layouts of four ranks, or of eight: conversion there and back, and logits, against transformers.

Arguments: RESULT SCRATCH [wide]. Rank 0 writes, per family and layout, what differs. Legend: B rows, T tokens, V
vocabulary.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nla_megatron.config.schema import OptimConfig, ParallelConfig
from nla_megatron.conversion.hf import SafetensorsReader, read_shape
from nla_megatron.conversion.live import Exporter, load_from_hf
from nla_megatron.models.batching import Batch, response_mask
from nla_megatron.models.decoder import build_chunks
from nla_megatron.models.pipeline import forward_each
from nla_megatron.models.reconstructor import Backbone
from nla_megatron.models.verbalizer import Verbalizer
from nla_megatron.parallel.collectives import barrier, gather_objects, sum_over_world
from nla_megatron.parallel.cpu import megatron_device
from nla_megatron.parallel.world import World, initialise
from nla_megatron.training.checkpoint import save_sharded
from nla_megatron.training.losses import cross_entropy
from nla_megatron.training.module import TrainModule
from nla_megatron.types import Microbatch, ModelShape
from tests.support.covering import chosen
from tests.support.families import MIXTURES, MODELS, family_model

ROWS, LENGTH, BLOCKS = 2, 14, 3
# Five blocks: no even division fits, and the first chunks take the remainder.
PLAIN: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2": {"tp": 2},
    "tp4": {"tp": 4},
    "pp2": {"pp": 2},
    "tp2 pp2": {"tp": 2, "pp": 2},
}
EXPERT: dict[str, dict[str, Any]] = {
    "ep2": {"ep": 2},
    "pp2 ep2": {"pp": 2, "ep": 2},
    "tp2 ep2": {"tp": 2, "ep": 2},
}
SPECIAL: dict[str, dict[str, Any]] = {
    "tp2 pp2 uneven": {"tp": 2, "pp": 2, "stages": [1, 4]},
    "pp2 vpp2": {"pp": 2, "vpp": 2, "stages": [1, 2, 1, 1]},
}
SPECIAL_EXPERT: dict[str, dict[str, Any]] = {
    "ep4": {"ep": 4},
    "etp2 ep2": {"ep": 2, "etp": 2},
    "tp2 ep2 etp1": {"tp": 2, "ep": 2, "etp": 1},
    "tp4 ep2 etp2": {"tp": 4, "ep": 2, "etp": 2},
    "pp2 vpp2 ep2": {"pp": 2, "vpp": 2, "ep": 2},
}
LAYOUTS = {**PLAIN, **EXPERT, **SPECIAL, **SPECIAL_EXPERT}
WIDE: dict[str, dict[str, Any]] = {
    "tp4 pp2": {"tp": 4, "pp": 2},
    "tp2 pp2 ep2": {"tp": 2, "pp": 2, "ep": 2},
    "tp4 pp2 ep2 etp2": {"tp": 4, "pp": 2, "ep": 2, "etp": 2},
}
"""Layouts of eight ranks."""
THOROUGH = ("gemma2", "qwen3-moe")
"""Families that go through the special layouts, which are alike for all."""
VARIANTS = ("qwen2-window", "llama-biased", "qwen3-moe-plain")
"""Other configurations of families that are there already: fewer layouts."""
WITHOUT_HEAD = ("llama", "gemma3", "qwen3-moe")
"""Families whose first blocks are compared on their own too, as the AR has them."""
COMPUTED = {"tp1", "tp2 pp2", *EXPERT, *SPECIAL_EXPERT, *WIDE} - {"pp2 vpp2 ep2"}
TRAINED = (("llama-biased", "tp2 pp2"), ("gemma3", "tp2 pp2"), ("qwen3-moe", "ep2"), ("qwen3-moe", "etp2 ep2"))
"""(family, layout) whose loss and gradients are compared too."""
RESHARDED = {"gemma2": ("tp2 pp2", "pp2 vpp2"), "qwen3-moe": ("pp2 ep2", "tp4 ep2 etp2")}
"""Saved in megatron-core's distributed format on the first layout, loaded on the second."""


def possible_layouts_of(name: str) -> list[str]:
    if name in VARIANTS:
        return ["tp1", "tp4", "tp2 pp2", *(["ep2"] if name in MIXTURES else [])]
    dense = [*PLAIN, *(SPECIAL if name in THOROUGH else ())]
    return [*dense, *EXPERT, *(SPECIAL_EXPERT if name in THOROUGH else ())] if name in MIXTURES else dense


def _factors(run: tuple[str, str]) -> tuple[object, ...]:
    sizes = LAYOUTS[run[1]]
    return (run[0], *(sizes.get(axis, 1) for axis in ("tp", "pp", "ep", "vpp")), "etp" in sizes, "stages" in sizes)


RUNS = chosen(
    [(name, layout) for name in MODELS for layout in possible_layouts_of(name)],
    _factors,
    [
        *((name, "tp2 pp2") for name in MODELS),
        *TRAINED,
        *((name, layout) for name, layouts in RESHARDED.items() for layout in layouts),
    ],
)
"""Families and layouts of four ranks; each family computes what transformers does on one of them at least."""


def layouts_of(name: str) -> list[str]:
    return [layout for one, layout in RUNS if one == name]


def wide_layouts_of(name: str) -> list[str]:
    return list(WIDE) if name in MIXTURES else ["tp4 pp2"]


def tokens() -> Tensor:
    return torch.randint(3, 1000, (ROWS, LENGTH), generator=torch.Generator().manual_seed(5))


def references(scratch: Path, world: World) -> None:
    """Make the models, and keep what transformers computes with each beside it; it saves on rank 0 only."""
    for name in MODELS if world.is_main else ():
        model = family_model(name, scratch / name)
        with torch.no_grad():
            out = model(tokens(), output_hidden_states=True)
        torch.save((out.logits, out.hidden_states[BLOCKS]), scratch / f"{name}.pt")
        if name in dict(TRAINED):
            loss = F.cross_entropy(model(tokens()).logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())
            loss.backward()
            squares = [parameter.grad.square().sum() for parameter in model.parameters()]
            torch.save((float(loss), float(torch.stack(squares).sum().sqrt())), scratch / f"{name}-trained.pt")
    barrier(world)


def learned(model: Verbalizer, reference: tuple[float, float], world: World) -> list[float]:
    """Relative differences of the loss and of the gradients' norm, of one update over rows shared out by DP."""
    module = TrainModule(model, world, OptimConfig(), 1, 1, "float32")
    mask = response_mask([1] * ROWS, [LENGTH] * ROWS, LENGTH)
    batch = Batch(ids=tokens().tolist(), fields={"mask": mask})
    update = module.update(batch, cross_entropy(float(mask.sum())), ("loss",), 0)
    ours = (update.statistics["loss"], update.grad_norm)
    return [abs(one - other) / other for one, other in zip(ours, reference, strict=True)]


def different(directory: Path, model: Any, shape: ModelShape, world: World) -> list[str]:
    """HF tensors that an export does not give bit for bit, or not at all; every rank looks at every tensor."""
    reader = SafetensorsReader(directory)
    exported: Iterator[tuple[str, Tensor]] = Exporter(model, shape, world, with_head=True).tensors()
    wrong, seen = [], set()
    for name, tensor in exported:
        seen.add(name)
        if not torch.equal(tensor, reader.read(name, 0, 0, tensor.shape[0])):
            wrong.append(name)
    return sorted({*wrong, *(seen ^ reader.names())})


def computed(model: Any, world: World) -> Tensor:
    """What the model puts out for the same rows on every data-parallel rank: gathered over TP, on every rank."""
    ids = tokens()
    part = Microbatch(ids, torch.full((ROWS,), LENGTH), torch.ones(ROWS), torch.arange(ROWS))
    outputs: list[Tensor] = []
    forward_each(model, [part], world, lambda output, _: outputs.append(output.clone()))
    mine = outputs[0] if outputs else None
    sizes = gather_objects(None if mine is None else tuple(mine.shape), world)
    shape = next(size for size in sizes if size is not None)
    is_logits = shape[0] == ROWS
    width = shape[-1] * (world.tp if is_logits else 1)
    full = torch.zeros(*shape[:-1], width)
    if mine is not None and world.dp_rank == 0 and (is_logits or world.tp_rank == 0):
        start = world.tp_rank * shape[-1] if is_logits else 0
        full[..., start : start + shape[-1]] = mine
    return sum_over_world(full, world)


def on_layout(name: str, layout: str, scratch: Path, world: World) -> dict[str, Any]:
    directory = scratch / name
    shape = read_shape(directory)
    model = build_chunks(Verbalizer, shape, world, "float32")
    load_from_hf(model, str(directory), shape, world, with_head=True)
    wrong = gather_objects(different(directory, model, shape, world), world)
    found: dict[str, Any] = {"different": sorted({one for rank in wrong for one in rank})}
    if layout in COMPUTED:
        logits, stream = torch.load(scratch / f"{name}.pt")
        ours = computed(model[0], world)[..., : shape.vocab_size]
        found["logits"] = float((ours - logits).abs().max() / logits.abs().max())
        if name in WITHOUT_HEAD:
            short = shape.truncated(BLOCKS)
            [backbone] = build_chunks(Backbone, short, world, "float32")
            load_from_hf(backbone, str(directory), short, world, with_head=False)
            ours = computed(backbone, world).transpose(0, 1)
            found["stream"] = float((ours - stream).abs().max() / stream.abs().max())
    found |= resharded(name, layout, scratch, model, world)
    if (name, layout) in TRAINED:
        found["learned"] = learned(model[0], torch.load(scratch / f"{name}-trained.pt"), world)
    return found


def resharded(name: str, layout: str, scratch: Path, model: list[Any], world: World) -> dict[str, Any]:
    from megatron.core import dist_checkpointing

    saved, loaded = RESHARDED.get(name, (None, None))
    directory = scratch / f"{name}-checkpoint"
    if layout == saved:
        if world.is_main:
            directory.mkdir()
        barrier(world)
        save_sharded(described(model), directory)
    if layout != loaded:
        return {}
    with torch.no_grad(), megatron_device():
        for chunk in model:
            for parameter in chunk.parameters():
                parameter.fill_(float("nan"))
        state = dist_checkpointing.load(described(model), str(directory))
        for number, chunk in enumerate(model):
            chunk.load_state_dict(state[f"chunk{number}"])
    return {"resharded": different(scratch / name, model, model[0].shape, world)}


def described(model: list[Any]) -> dict[str, Any]:
    """All chunks at once: the checkpoint's integrity is that of the whole model."""
    return {f"chunk{number}": chunk.sharded_state_dict() for number, chunk in enumerate(model)}


def main(result: str, scratch: str, width: str = "") -> None:
    from megatron.core import parallel_state

    found: dict[str, Any] = {}
    layouts, of_family = (WIDE, wide_layouts_of) if width == "wide" else (LAYOUTS, layouts_of)
    for number, (layout, options) in enumerate(layouts.items()):
        world = initialise(ParallelConfig(**options))
        if number == 0:
            references(Path(scratch), world)
        for name in MODELS:
            if layout in of_family(name):
                found[f"{name} {layout}"] = on_layout(name, layout, Path(scratch), world)
        barrier(world)
        parallel_state.destroy_model_parallel()
    if dist.get_rank() == 0:
        Path(result).write_text(json.dumps(found))
    dist.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
