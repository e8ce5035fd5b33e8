"""What a model computes, learns and exports on every layout that four ranks can have, against transformers.

Arguments: RESULT SCRATCH. Rank 0 writes, per layout, the largest differences found.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nla_megatron.config.schema import ParallelConfig
from nla_megatron.conversion.hf import SafetensorsReader, read_shape
from nla_megatron.conversion.live import Exporter, load_from_hf
from nla_megatron.interventions.spec import Intervention
from nla_megatron.models.batching import Batch
from nla_megatron.models.builder import beside_av
from nla_megatron.models.interventions import intervene
from nla_megatron.models.logprobs import response_logprobs
from nla_megatron.models.reconstructor import build_reconstructor
from nla_megatron.models.verbalizer import build_verbalizer
from nla_megatron.parallel.collectives import barrier
from nla_megatron.parallel.cpu import megatron_device
from nla_megatron.parallel.world import World, initialise
from nla_megatron.tasks.nla import squared_error
from nla_megatron.training.checkpoint import save_sharded
from nla_megatron.training.losses import cross_entropy, reconstruction
from nla_megatron.training.module import TrainModule
from nla_megatron.training.reference import MovingCopy
from tests.support.covering import chosen
from tests.support.injected import LAYER, LENGTHS, OPTIM, PROMPT, STEPS, av_batch, captured, injected, rows
from tests.support.reinforced import compare_reinforced, reinforced, reinforced_reference
from tests.support.tiny import tiny_model

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]
# One more block than stages divide, a vocabulary that needs padding, tied and untied embeddings.
MODELS = {"tied": {"tied_embeddings": True}, "untied": {"tied_embeddings": False}}
_POSSIBLE = [
    (name, tp, pp, stages)
    for name in MODELS
    for tp, pp in LAYOUTS
    for stages in ("even", "uneven")
    if stages == "even" or (pp == 2 and name == "untied")
]
RUNS = chosen(_POSSIBLE, tuple, [(name, 1, 1, "even") for name in MODELS])
"""Models, layouts, and how stages share the blocks: of the AV's 5 an uneven first stage has 1, and 1 of the AR's 3."""


def key_of(name: str, tp: int, pp: int, stages: str) -> str:
    return f"{name} tp{tp} pp{pp}" + (" uneven" if stages == "uneven" else "")


KEYS = [key_of(*run) for run in RUNS]
EVEN = list(dict.fromkeys(key.removesuffix(" uneven") for key in KEYS))


def on_layout(directory: Path, world: World) -> dict[str, Any]:
    """Numbers of one layout: export, log-probs and vectors before and after a few updates, and the losses between."""
    shape = read_shape(directory)
    data = rows(shape)
    batch, width = av_batch(data), max(LENGTHS)
    av = build_verbalizer(shape, world, "float32")
    load_from_hf(av, str(directory), shape, world, with_head=True)
    exported = {name: tensor.clone() for name, tensor in Exporter(av, shape, world, with_head=True).tensors()}
    reader = SafetensorsReader(directory)
    exact = set(exported) == reader.names() and all(
        torch.equal(tensor, reader.read(name, 0, 0, tensor.shape[0])) for name, tensor in exported.items()
    )
    intervene(av, [Intervention(LAYER, "norm_add")])
    module = TrainModule(av, world, OPTIM, STEPS, 2, "float32")
    before = module.rows(batch, response_logprobs(1.0), width)
    total = float(batch.fields["mask"].sum())
    updates = [module.update(batch, cross_entropy(total), ("loss",), step) for step in range(STEPS)]
    trained = {name: tensor.clone() for name, tensor in Exporter(av, shape, world, with_head=True).tensors()}

    short = shape.truncated(3)
    beside = beside_av(world)
    ar = build_reconstructor(short, beside, "float32")
    load_from_hf(ar, str(directory), short, beside, with_head=False)
    reader_module = TrainModule(ar, world, OPTIM, STEPS, 2, "float32")
    targets = Batch(ids=data.ids, vectors=batch.vectors)
    errors = reader_module.rows(targets, squared_error)
    ar_updates = [reader_module.update(targets, reconstruction(len(LENGTHS)), ("loss",), step) for step in range(STEPS)]
    return {
        "exact": exact,
        "logprobs": before,
        "losses": [update.statistics["loss"] for update in updates],
        "norms": [update.grad_norm for update in updates],
        "trained": trained,
        "errors": errors,
        "ar_losses": [update.statistics["loss"] for update in ar_updates],
        "ar_norms": [update.grad_norm for update in ar_updates],
    }


def reference(directory: Path) -> dict[str, Any]:
    """The same as `on_layout` by transformers, a forward hook and torch's AdamW."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    data = rows(read_shape(directory))
    vectors = torch.from_numpy(data.vectors)

    def run(row: int) -> torch.Tensor:
        ids = torch.tensor(data.ids[row])
        with injected(model, vectors[row]):
            logits = model(ids[None]).logits[0]
        return torch.log_softmax(logits, -1)[:-1].gather(-1, ids[1:, None])[PROMPT - 1 :, 0]

    def vector(row: int) -> torch.Tensor:
        with captured(model, 2) as stream:
            model(torch.tensor(data.ids[row])[None])
        return stream[0][-1]

    with torch.no_grad():
        logprobs = [run(row) for row in range(len(LENGTHS))]
        d = vectors.shape[1]
        unit = torch.stack([vector(row) for row in range(len(LENGTHS))])
        errors = (
            (unit / unit.norm(dim=-1, keepdim=True) - vectors / vectors.norm(dim=-1, keepdim=True)).square().sum(-1)
            * d
            / d
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=OPTIM.lr, betas=(OPTIM.beta1, OPTIM.beta2), weight_decay=0.0)
    losses, norms = [], []
    for _ in range(STEPS):
        loss = -torch.cat([run(row) for row in range(len(LENGTHS))]).mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_grad)))
        optimizer.step()
        losses.append(float(loss))
    return {"logprobs": logprobs, "errors": errors, "losses": losses, "norms": norms, "trained": model.state_dict()}


def in_bf16(directory: Path, world: World) -> dict[str, Any]:
    """Log-probs, dtypes of parameters and masters, and the loss over a few updates, all in bf16."""
    shape = read_shape(directory)
    batch, width = av_batch(rows(shape)), max(LENGTHS)
    av = build_verbalizer(shape, world, "bfloat16")
    load_from_hf(av, str(directory), shape, world, with_head=True)
    intervene(av, [Intervention(LAYER, "norm_add")])
    module = TrainModule(av, world, OPTIM, STEPS, 2, "bfloat16")
    logprobs = module.rows(batch, response_logprobs(1.0), width)
    total = float(batch.fields["mask"].sum())
    updates = [module.update(batch, cross_entropy(total), ("loss",), step) for step in range(STEPS)]
    masters = [master for group in module.optimizer.param_groups for master in group["params"]]
    return {
        "logprobs": logprobs,
        "losses": [update.statistics["loss"] for update in updates],
        "parameters": sorted({str(parameter.dtype) for parameter in av.parameters()}),
        "masters": sorted({str(master.dtype) for master in masters}),
    }


def moving_reference(directory: Path, world: World, kept: Path, resumes: bool) -> dict[str, float]:
    """How far the moving average of a policy is from one of exported tensors, here or loaded from `kept`."""
    from megatron.core import dist_checkpointing

    shape = read_shape(directory)
    av = build_verbalizer(shape, world, "float32")
    load_from_hf(av, str(directory), shape, world, with_head=True)
    copy, exporter = MovingCopy(av, decay=0.75), Exporter(av, shape, world, with_head=True)
    average = {name: tensor.clone() for name, tensor in exporter.tensors()}
    if resumes:
        with megatron_device():
            copy.load_state(dist_checkpointing.load(copy.state(loading=True), str(kept)))
        own = {name: tensor.clone() for name, tensor in exporter.tensors()}
        moved = max(float((own[name] - average[name]).abs().max()) for name in own)
        average = torch.load(f"{kept}.pt")
    else:
        batch = av_batch(rows(shape))
        intervene(av, [Intervention(LAYER, "norm_add")])
        module, total = TrainModule(av, world, OPTIM, STEPS, 2, "float32"), float(batch.fields["mask"].sum())
        for step in range(STEPS):
            module.update(batch, cross_entropy(total), ("loss",), step)
            copy.follow()
            for name, tensor in exporter.tensors():
                average[name] = 0.75 * average[name] + 0.25 * tensor
        if world.is_main:
            kept.mkdir()
            torch.save(average, f"{kept}.pt")
        barrier(world)
        save_sharded(copy.state(loading=False), kept)
        trained = dict(exporter.tensors())
        moved = min(float((trained[name] - average[name]).abs().max()) for name in trained)
    with copy.in_place():
        found = {name: tensor.clone() for name, tensor in exporter.tensors()}
    return {"off": max(float((found[name] - average[name]).abs().max()) for name in average), "moved": moved}


def compare(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    rows_of = [found["logprobs"][row, PROMPT - 1 : LENGTHS[row] - 1] for row in range(len(LENGTHS))]
    return {
        "exact": found["exact"],
        "logprob": max(float((a - b).abs().max()) for a, b in zip(rows_of, expected["logprobs"], strict=True)),
        "error": float((found["errors"] - expected["errors"]).abs().max()),
        "loss": max(abs(a - b) for a, b in zip(found["losses"], expected["losses"], strict=True)),
        "norm": max(abs(a - b) / b for a, b in zip(found["norms"], expected["norms"], strict=True)),
        "weight": max(
            float((tensor - expected["trained"][name]).abs().max()) for name, tensor in found["trained"].items()
        ),
        "ar_losses": found["ar_losses"],
        "ar_norms": found["ar_norms"],
    }


def main(result: str, scratch: str) -> None:
    from megatron.core import parallel_state

    out: dict[str, Any] = {}
    found: dict[str, Any] = {}
    bf16: dict[str, Any] = {}
    rl: dict[str, Any] = {}
    for tp, pp in LAYOUTS:
        world = initialise(ParallelConfig(tp=tp, pp=pp))
        for name, options in MODELS.items():
            directory = Path(scratch) / name
            if world.is_main and not directory.exists():
                tiny_model(directory, num_layers=5, vocab_size=1000, **options)
            barrier(world)
            even, uneven = (key_of(name, tp, pp, stages) for stages in ("even", "uneven"))
            if even in KEYS:
                found[even] = on_layout(directory, world)
            if uneven in KEYS:
                found[uneven] = on_layout(directory, replace(world, stages=(1, 4), ar_stages=(1, 2)))
            if even in EVEN:
                rl[even] = reinforced(directory, world)
        bf16[f"tp{tp} pp{pp}"] = in_bf16(directory, world)
        if (tp, pp) in (LAYOUTS[0], LAYOUTS[-1]):
            kept = Path(scratch) / "moving"
            out[f"moving tp{tp} pp{pp}"] = moving_reference(directory, world, kept, resumes=kept.exists())
        parallel_state.destroy_model_parallel()
    if world.is_main:
        wanted = {name: reference(Path(scratch) / name) for name in MODELS}
        wanted_rl = {name: reinforced_reference(Path(scratch) / name) for name in MODELS}
        for key, numbers in found.items():
            out[key] = compare(numbers, wanted[key.split()[0]])
        for key, numbers in rl.items():
            out[f"rl {key}"] = compare_reinforced(numbers, wanted_rl[key.split()[0]])
        exact = found["untied tp1 pp1"]["logprobs"]
        for key, numbers in bf16.items():
            gap = float((numbers.pop("logprobs") - exact).abs().max())
            out[f"bf16 {key}"] = {**numbers, "gap": gap}
        Path(result).write_text(json.dumps(out))
    barrier(world)


if __name__ == "__main__":
    main(*sys.argv[1:3])
