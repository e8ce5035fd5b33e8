"""Interventions in Megatron on four ranks against a hooked transformers model: log-probs and all gradients, fp32.

Arguments: RESULT SCRATCH. Rank 0 writes, per layout, way of recomputing and mode, the largest differences found.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nla_megatron.config.schema import OptimConfig, ParallelConfig
from nla_megatron.conversion.hf import read_shape
from nla_megatron.conversion.live import Exporter, global_parameters, load_from_hf
from nla_megatron.interventions.schedules import Schedule
from nla_megatron.interventions.spec import Intervention
from nla_megatron.models.batching import Batch, response_mask
from nla_megatron.models.decoder import build_chunks
from nla_megatron.models.interventions import intervene
from nla_megatron.models.logprobs import response_logprobs
from nla_megatron.models.pipeline import forward_backward
from nla_megatron.models.projections import projections_of, whole_projections
from nla_megatron.models.reconstructor import Reconstructor
from nla_megatron.models.verbalizer import Verbalizer
from nla_megatron.parallel.collectives import barrier, gather_objects
from nla_megatron.parallel.world import World, initialise
from nla_megatron.training.checkpoint import Checkpoints
from nla_megatron.training.losses import cross_entropy, reconstruction
from nla_megatron.training.module import TrainModule
from tests.support import hooked
from tests.support.covering import chosen
from tests.support.refusals import named
from tests.support.tiny import tiny_model

LAYOUTS = {
    "tp2 pp2": ParallelConfig(tp=2, pp=2),
    "tp2 pp2 recomputed": ParallelConfig(tp=2, pp=2, recompute="full"),
    "tp2 pp2 vpp2 recomputed": ParallelConfig(tp=2, pp=2, vpp=2, recompute="full"),
    "tp2 pp2 sequence parallel recomputed": ParallelConfig(tp=2, pp=2, sequence_parallel=True, recompute="full"),
}
BLOCKS, STEP = 5, 3
PROMPTS, LENGTHS = (6, 10, 5, 7), (11, 15, 9, 12)
POSITIONS = ((3,), (1, 6), (4,), (0, 2, 5))
# Of rows that bring two vectors; with sequence parallelism those of the second row are on different ranks.
PAIRS = ((3, 5), (1, 9), (0, 4), (6, 2))
# Of rows that bring one to three.
ANY = ((3,), (1, 9), (4, 0, 2), (6, 2))
CHOSEN, MAX_ACTS = (3, 7), (1.5, 0.5)
OPTIM = OptimConfig(lr=1e-3, warmup_steps=0, schedule="constant")
STRENGTHS = (1.5, 0.5, 1.25, 2.0)  # 1 would change nothing


def interventions(sae: Path) -> tuple[Intervention, ...]:
    steering: dict[str, Any] = {"sae": str(sae)}
    return (
        Intervention(1, "norm_add"),
        Intervention("embedding", "replace", strength=3.0),
        Intervention(3, "add", "generated", 0.5, Schedule("linear", "decode", 1.0, -1.0, 4)),
        Intervention(2, "project", strength=0.7),
        Intervention(1, "features", "all", features=CHOSEN, max_acts=MAX_ACTS, **steering),
        Intervention(0, "clamp", "prompt", features=(5,), max_acts=(2.0,), **steering),
        Intervention(4, "global", "generated", **steering),
        Intervention(3, "norm_add", "all", 0.3, Schedule("cosine", "training", 1.0, 0.5, 6)),
        Intervention("embedding", "norm_add", "prompt", 0.5),
        Intervention(2, "norm_add", strength=1.5, vectors=2),
        Intervention(4, "replace", strength=2.0, vectors=2),
        Intervention(2, "norm_add", strength=1.5, vectors=3, fewest=1),
        Intervention(4, "replace", strength=2.0, vectors=3, fewest=1),
    )


PROJECTING = (
    Intervention(0, "project", projection_layers=2),
    Intervention(3, "project", strength=2.0, then="replace", projection_layers=2),
)
"""On different stages, with dropout."""
PROJECTED = {"alone": ParallelConfig(), **{name: LAYOUTS[name] for name in ("tp2 pp2", *list(LAYOUTS)[2:])}}

NAMES = ("norm_add", "replace", "add", "project", "features", "clamp", "global", "training", "embedding")
CASES: dict[str, tuple[int, ...]] = {name: (number,) for number, name in enumerate(NAMES)}
SEVERAL, OTHERS = (len(NAMES), len(NAMES) + 1), (len(NAMES) + 2, len(NAMES) + 3)
CASES |= {"all": tuple(range(len(NAMES))), "none": (), "several vectors": (0, *SEVERAL), "one to three": (0, *OTHERS)}
FEWER = ("replace", "add", "project", "global", "all", "several vectors", "one to three")
"""Where chunks or shards are new and the modes are not."""


def _factors(run: tuple[str, str]) -> tuple[object, ...]:
    layout = LAYOUTS[run[0]]
    return (run[1], layout.recompute, layout.vpp, layout.sequence_parallel)


RUNS = chosen(
    [
        (layout, case)
        for layout, sizes in LAYOUTS.items()
        for case in CASES
        if case in FEWER or (sizes.vpp == 1 and not sizes.sequence_parallel)
    ],
    _factors,
    [("tp2 pp2", case) for case in CASES],
)
"""Layouts, and what intervenes on them."""


class Reference:
    """The same nine by hand, with the data of four unlike rows."""

    def __init__(self, directory: Path, sae: hooked.PlainSae):
        self.hooked, self.sae = hooked.Hooked(directory), sae
        rng = np.random.default_rng(7)
        shape = read_shape(directory)
        self.ids = [rng.integers(3, shape.vocab_size, length).tolist() for length in LENGTHS]
        self.vectors = rng.standard_normal((len(LENGTHS), shape.hidden_size)).astype(np.float32) * 5
        before = rng.standard_normal(self.vectors.shape).astype(np.float32) * 5
        self.pairs = np.stack([before, self.vectors], axis=1)
        first = rng.standard_normal(self.vectors.shape).astype(np.float32) * 5
        self.triples = np.stack([first, before, self.vectors], axis=1)
        for row, places in enumerate(ANY):
            self.triples[row, : 3 - len(places)] = np.nan
        self.w = torch.eye(shape.hidden_size).requires_grad_()
        self.b = torch.zeros(shape.hidden_size).requires_grad_()

    def changes(self, row: int, only: Sequence[int]) -> list[hooked.Change]:
        v, prompt = torch.from_numpy(self.vectors[row]), PROMPTS[row]
        own = STRENGTHS[row]

        def marked(s: float) -> Callable[[int], float | None]:
            places, _ = self.brought(only)
            return lambda t: s if t in places[row] else None

        def each_at_its_own(layer: int, formula: hooked.Formula, s: float) -> list[hooked.Change]:
            places, vectors = self.brought(only)
            return [
                hooked.Change(layer, formula, torch.from_numpy(each), lambda t, at=at: s if t == at else None)
                for at, each in zip(places[row], vectors[row, -len(places[row]) :], strict=True)
            ]

        trained = 0.3 * (1.0 - 0.5 * (1 - math.cos(math.pi * STEP / 6)) / 2)
        every = [
            hooked.Change(1, hooked.norm_add, v, marked(1.0)),
            hooked.Change("embedding", hooked.replace, v, marked(3.0)),
            hooked.Change(3, hooked.add, v, lambda t: None if t < prompt else 0.5 * (1 - 2 * min(t - prompt, 4) / 4)),
            hooked.Change(2, hooked.norm_add, self.w @ v + self.b, marked(0.7)),
            hooked.Change(1, self.sae.features(CHOSEN, MAX_ACTS), v, lambda t: 1.0),
            hooked.Change(0, self.sae.clamp(5, 2.0), v, lambda t: 1.0 if t < prompt else None),
            hooked.Change(4, self.sae.scaled, v, lambda t: None if t < prompt else own),
            hooked.Change(3, hooked.norm_add, v, lambda t: trained),
            hooked.Change("embedding", hooked.norm_add, v, lambda t: 0.5 if t < prompt else None),
        ]
        chosen = [change for number, change in enumerate(every) if number in only]
        if max(only, default=0) >= len(NAMES):
            chosen += [*each_at_its_own(2, hooked.norm_add, 1.5), *each_at_its_own(4, hooked.replace, 2.0)]
        return chosen

    def brought(self, only: Sequence[int]) -> tuple[Sequence[tuple[int, ...]], np.ndarray]:
        """Positions and vectors of all rows."""
        if SEVERAL[0] in only:
            return PAIRS, self.pairs
        return (ANY, self.triples) if OTHERS[0] in only else (POSITIONS, self.vectors)

    def run(self, only: Sequence[int]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Log-probs of each response, and the gradient of their mean loss by name."""
        model = self.hooked.model
        parameters = {**dict(model.named_parameters()), "w": self.w, "b": self.b}
        for parameter in parameters.values():
            parameter.grad = None
        found = [
            self.hooked.scores(ids[:prompt], ids[prompt:], self.changes(row, only))
            for row, (ids, prompt) in enumerate(zip(self.ids, PROMPTS, strict=True))
        ]
        (-torch.cat(found).mean()).backward()
        gradients = {name: each.grad.clone() for name, each in parameters.items() if each.grad is not None}
        return [each.detach() for each in found], gradients


def batch_of(reference: Reference, only: tuple[int, ...]) -> Batch:
    mask = response_mask(PROMPTS, LENGTHS, max(LENGTHS))
    own = tuple(tuple((s,) if number == 6 else None for number in range(len(NAMES) + 4)) for s in STRENGTHS)
    positions, vectors = reference.brought(only)
    return Batch(
        ids=reference.ids, fields={"mask": mask}, positions=positions, prompt_lengths=PROMPTS,
        vectors=lambda rows: vectors[list(rows)], only=[only] * len(LENGTHS), strengths=own,
        training_step=STEP,
    )  # fmt: skip


def module_of(directory: Path, world: World, wanted: Sequence[Intervention], dropout: float = 0.0) -> TrainModule:
    shape = read_shape(directory)
    chunks = build_chunks(Verbalizer, shape, world, "float32")
    load_from_hf(chunks, str(directory), shape, world, with_head=True)
    intervene(chunks, wanted, seed=3, dropout=dropout)
    return TrainModule(chunks, world, OPTIM, 3, 1, "float32")


def gradients(module: TrainModule, batch: Batch, world: World) -> dict[str, Tensor]:
    """Of every parameter by its Hugging Face name, whole, and of the projection."""
    for chunk in module.wrapped:
        chunk.train()
        chunk.zero_grad_buffer()
    forward_backward(module.wrapped, batch, world, 1, cross_entropy(float(batch.fields["mask"].sum())))
    exporter = Exporter(module.chunks, module.chunks[0].shape, world, with_head=True)
    exporter.parameters = {name: each.main_grad for name, each in global_parameters(module.chunks).items()}
    found = {name: tensor.clone() for name, tensor in exporter.tensors()}
    mine = [
        {"w": each.linears[0].weight.main_grad, "b": each.linears[0].bias.main_grad}
        for each in projections_of(module.chunks).values()
    ]
    for learned in gather_objects(mine, world):
        for each in learned:
            found |= each
    return found


def projecting(directory: Path, scratch: Path, name: str, world: World, reference: Reference) -> dict[str, Any]:
    """Three updates of an AV that projects, with what its projections are afterwards; a checkpoint after the second.

    `resumed`: the third from the checkpoint of the model alone.
    """
    batch = replace(batch_of(reference, (0,)), only=None, strengths=None)
    loss = cross_entropy(float(batch.fields["mask"].sum()))

    def learned(module: TrainModule, steps: Sequence[int]) -> dict[str, Any]:
        updates = [module.update(replace(batch, training_step=step), loss, ("loss",), step) for step in steps]
        whole = whole_projections(module.chunks, world)
        values = {f"{number}.{key}": each for number, one in whole.items() for key, each in one.state_dict().items()}
        everyone = gather_objects([float(each.double().sum()) for each in values.values()], world)
        return {
            "losses": [update.statistics["loss"] for update in updates],
            "norms": [update.grad_norm for update in updates],
            "projections": {key: each.flatten().tolist() for key, each in values.items()},
            "same": all(sums == everyone[0] for sums in everyone),
        }

    def checkpoints(of: str) -> Checkpoints:
        return Checkpoints(scratch / f"projecting {of}", "sft av", world, 1)

    module = module_of(directory, world, PROJECTING, dropout=0.25)
    first = learned(module, (0, 1))
    checkpoints(name).save(2, {"av": module}, {}, {})
    out = {"first": first, "last": learned(module, (2,))}
    fresh = module_of(directory, world, PROJECTING, dropout=0.25)
    out["start"] = learned(fresh, ())
    assert checkpoints("alone").resume({"av": fresh}, {}, {}) == 2
    return out | {"resumed": learned(fresh, (2,))}


class InFlight:
    """How many microbatches a rank's block has run without having recomputed them yet, at the most."""

    def __init__(self, module: TrainModule):
        self.now = self.most = 0
        module.chunks[0].decoder.layers[0].register_forward_pre_hook(self._seen)

    def _seen(self, block: Any, inputs: Any) -> None:
        self.now += -1 if torch.is_grad_enabled() else 1
        self.most = max(self.most, self.now)


def on_layout(layout: str, directory: Path, sae: Path, world: World, reference: Reference) -> dict[str, Any]:
    """Log-probs and gradients of every case, and of three updates with all interventions."""
    module, width = module_of(directory, world, interventions(sae)), max(LENGTHS)
    out: dict[str, Any] = {}
    counter = InFlight(module)
    for name in (case for where, case in RUNS if where == layout):
        batch = batch_of(reference, CASES[name])
        logprobs = module.rows(batch, response_logprobs(1.0), width)
        counter.now = 0
        out[name] = (logprobs, gradients(module, batch, world))
    batch = batch_of(reference, CASES["all"])
    loss = cross_entropy(float(batch.fields["mask"].sum()))
    updates = [module.update(batch, loss, ("loss",), step) for step in range(3)]
    out["losses"] = [update.statistics["loss"] for update in updates]
    out["norms"] = [update.grad_norm for update in updates]
    out["in_flight"] = max(gather_objects(counter.most, world))
    return out | ar_on_layout(directory, world, reference)


def ar_on_layout(directory: Path, world: World, reference: Reference) -> dict[str, Any]:
    """Losses and gradient norms of an AR, whose head reads tokens that sequence parallelism has shared out."""
    shape = read_shape(directory).truncated(BLOCKS)
    chunks = build_chunks(Reconstructor, shape, world, "float32")
    load_from_hf(chunks, str(directory), shape, world, with_head=False)
    module = TrainModule(chunks, world, OPTIM, 2, 1, "float32")
    batch = Batch(ids=reference.ids, vectors=lambda rows: reference.vectors[list(rows)])
    updates = [module.update(batch, reconstruction(len(LENGTHS)), ("loss",), step) for step in range(2)]
    return {
        "ar_losses": [update.statistics["loss"] for update in updates],
        "ar_norms": [update.grad_norm for update in updates],
    }


def compare(found: tuple[Tensor, dict[str, Tensor]], wanted: tuple[list[Tensor], dict[str, Tensor]]) -> dict[str, Any]:
    """Largest differences; of gradients, relative to the largest entry of the tensor and of the whole's scale."""
    logprobs, gradient = found
    rows = [logprobs[row, PROMPTS[row] - 1 : LENGTHS[row] - 1] for row in range(len(LENGTHS))]
    scale = max(float(each.abs().max()) for each in wanted[1].values())
    worst = {}
    for name, each in wanted[1].items():
        worst[name] = float((gradient[name] - each).abs().max()) / max(float(each.abs().max()), 1e-3 * scale)
    missing = sorted(name for name, each in gradient.items() if name not in wanted[1] and float(each.abs().max()) > 0)
    where = max(worst, key=lambda name: worst[name])
    return {
        "logprob": max(float((a - b).abs().max()) for a, b in zip(rows, wanted[0], strict=True)),
        "gradient": worst[where], "where": where, "unexpected": missing, "compared": len(worst),
    }  # fmt: skip


def faults(directory: Path, scratch: Path, world: World, reference: Reference) -> dict[str, str]:
    """What is refused by name, on every rank."""
    hooked.write_sae(scratch / "narrow", 32) if world.is_main else None
    barrier(world)
    wide = {"vectors": lambda rows: np.ones((len(rows), 7), np.float32)}
    nan = {"vectors": lambda rows: np.full((len(rows), 64), np.nan, np.float32)}

    @cache
    def build(wanted: Intervention) -> TrainModule:
        return module_of(directory, world, [wanted])

    def run(wanted: Intervention, **options: Any) -> str:
        """What one model says to one batch after another: a refusal leaves nothing behind."""
        batch = Batch(**{**vars(batch_of(reference, (0,))), "only": None, "strengths": None, **options})
        module = build(wanted)
        return named(lambda: module.rows(batch, response_logprobs(1.0), max(LENGTHS)))

    marked, everywhere = Intervention(4, "norm_add"), Intervention(0, "add", "generated")
    pair, pairs = Intervention(4, "norm_add", vectors=2), {"vectors": lambda rows: reference.pairs[list(rows)]}
    others = Intervention(4, "norm_add", vectors=3, fewest=1)
    triples = {"vectors": lambda rows: reference.triples[list(rows)]}
    return {
        "layer": named(lambda: build(Intervention(BLOCKS, "add"))),
        "sae": named(lambda: build(Intervention(0, "global", "all", sae=str(scratch / "narrow")))),
        "width": run(marked, **wide),
        "nan": run(marked, **nan),
        "outside": run(marked, positions=[(3,), (10,), (4,), (0,)]),
        "prompt": run(everywhere, prompt_lengths=(6, 16, 5, 7)),
        "no_prompts": run(everywhere, prompt_lengths=None),
        "no_positions": run(marked, positions=None),
        "no_vectors": run(marked, vectors=None),
        "single_vectors": run(pair, positions=PAIRS),
        "fewer_positions": run(pair, positions=[*PAIRS[:3], (2,)], **pairs),
        "more_brought": run(others, positions=[*ANY[:2], (4, 0), ANY[3]], **triples),
        "more_positions": run(others, positions=[ANY[0], (1, 3, 9), *ANY[2:]], **triples),
        "no_position": run(others, positions=[(), *ANY[1:]], **triples),
        "fine_others": run(others, positions=ANY, **triples),
        "fine": run(marked),
        "fine_pairs": run(pair, positions=PAIRS, **pairs),
    }


def main(result: str, scratch: str) -> None:
    from megatron.core import parallel_state

    directory, sae = Path(scratch) / "model", Path(scratch) / "sae"
    found: dict[str, dict[str, Any]] = {}
    out: dict[str, Any] = {}
    for name, layout in {**PROJECTED, **LAYOUTS}.items():
        world = initialise(layout)
        if world.is_main and not directory.exists():
            tiny_model(directory, num_layers=BLOCKS)
            hooked.write_sae(sae, read_shape(directory).hidden_size)
        barrier(world)
        if name == "alone":
            from safetensors.torch import load_file

            reference = Reference(directory, hooked.PlainSae(load_file(sae / "sae_weights.safetensors")))
        if name in PROJECTED:
            out[f"projecting {name}"] = projecting(directory, Path(scratch), name, world, reference)
        if name in LAYOUTS:
            found[name] = on_layout(name, directory, sae, world, reference)
        if name == "tp2 pp2":
            out["faults"] = gather_objects(faults(directory, Path(scratch), world, reference), world)
        parallel_state.destroy_model_parallel()
    if world.is_main:
        wanted = {case: reference.run(only) for case, only in CASES.items()}
        for name, numbers in found.items():
            out[name] = {case: compare(numbers[case], wanted[case]) for case in CASES if case in numbers}
            out[name] |= {key: numbers[key] for key in ("losses", "norms", "in_flight", "ar_losses", "ar_norms")}
        out["effects"] = {
            case: min(float((a - b).abs().max()) for a, b in zip(wanted[case][0], wanted["none"][0], strict=True))
            for case in CASES
        }
        shifted = reference.vectors.copy()
        reference.vectors = np.roll(shifted, 1, axis=0)
        out["wrong vectors"] = compare(found["tp2 pp2"]["norm_add"], reference.run(CASES["norm_add"]))
        reference.vectors, reference.pairs = shifted, reference.pairs[:, ::-1].copy()
        shifted = reference.triples.copy()
        reference.triples[1, 1:], reference.triples[2] = shifted[1, :0:-1], shifted[2, ::-1]
        out["swapped others"] = compare(found["tp2 pp2"]["one to three"], reference.run(CASES["one to three"]))
        out["swapped vectors"] = compare(found["tp2 pp2"]["several vectors"], reference.run(CASES["several vectors"]))
        Path(result).write_text(json.dumps(out, indent=1))
    barrier(world)


if __name__ == "__main__":
    main(*sys.argv[1:3])
