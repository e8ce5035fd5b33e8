"""Conversion by four workers, against what megatron-core itself saves and loads at TP 2 x PP 2.

Arguments: RESULT SCRATCH. Rank 0 writes what differed, per family, and the peak of memory of each rank.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nla_megatron.config.schema import OptimConfig, ParallelConfig
from nla_megatron.conversion.exporting import Export
from nla_megatron.conversion.families import rules_of
from nla_megatron.conversion.families.qwen3 import config_from_shape
from nla_megatron.conversion.hf import read_shape, write_shards
from nla_megatron.conversion.importing import Import
from nla_megatron.conversion.live import Exporter, global_parameters, load_from_hf
from nla_megatron.conversion.live_shards import write_live_shards
from nla_megatron.conversion.safetensors_file import TensorSpec
from nla_megatron.models.reconstructor import build_reconstructor
from nla_megatron.models.verbalizer import build_verbalizer
from nla_megatron.parallel.collectives import barrier, gather_objects
from nla_megatron.parallel.cpu import megatron_device
from nla_megatron.parallel.world import World, initialise
from nla_megatron.types import ModelShape
from tests.support.families import MIXTURES, MODELS, family_model

SMALL = 20_000  # bytes of a shard: every model has several, for every rank
CUT = [name for name in MODELS if name not in MIXTURES] + [MIXTURES[0]]
AR_LACKS = ("model.norm.", "lm_head.", "model.layers.3.", "model.layers.4.")
SAVED = ["qwen3", "gemma3", MIXTURES[0]]
NAMINGS: dict[str, dict[str, bool]] = {
    "stacked": {}, "by block": {"non_homogeneous_layers": True}, "single": {"singleton_local_shards": True},
}  # fmt: skip
BIG = ModelShape(
    family="Qwen3ForCausalLM", num_layers=2, hidden_size=1024, ffn_hidden_size=3072, num_heads=16, num_kv_heads=8,
    head_dim=64, vocab_size=8_000, rope_theta=1e6, norm_eps=1e-6, tied_embeddings=False, qk_norm=True, max_positions=64,
)  # fmt: skip


def different(one: Path, other: Path) -> list[str]:
    """Names of tensors that two Hugging Face directories do not have alike."""
    sides = [
        {name: tensor for file in sorted(path.glob("model*.safetensors")) for name, tensor in load_file(file).items()}
        for path in (one, other)
    ]
    names = sides[0].keys() | sides[1].keys()
    return sorted(
        name for name in names if not all(name in side for side in sides) or not torch.equal(*(s[name] for s in sides))
    )


def convert(scratch: Path, name: str, world: World) -> None:
    """HF -> checkpoint -> HF, by all ranks."""
    directory = scratch / name
    Import(directory / "hf", directory / "mcore", shard_bytes=SMALL).run(world)
    Export(directory / "mcore", None, directory / "back", world, shard_bytes=SMALL).run(world)


def on_layout(scratch: Path, name: str, world: World) -> dict[str, Any]:
    """megatron-core loads what was imported, and saves what will be exported, at TP 2 x PP 2."""
    from megatron.core import dist_checkpointing

    from nla_megatron.training.checkpoint import save_sharded

    directory = scratch / name
    shape = read_shape(directory / "hf")
    ours, theirs = (build_verbalizer(shape, world, "float32") for _ in range(2))
    load_from_hf(ours, str(directory / "hf"), shape, world, with_head=True)
    with megatron_device():
        wanted = {"model": theirs.sharded_state_dict()}
        theirs.load_state_dict(dist_checkpointing.load(wanted, str(directory / "mcore" / "weights"))["model"])
    loaded = global_parameters(theirs)
    wrong = [key for key, value in global_parameters(ours).items() if not torch.equal(value, loaded[key])]
    for naming, metadata in NAMINGS.items() if name in SAVED else ():
        saved = directory / f"saved {naming}"
        if world.is_main:
            saved.mkdir()
        barrier(world)
        with megatron_device():
            state = ours.sharded_state_dict(prefix="module.", metadata=dict(metadata))
        save_sharded({"model": state}, saved)
    if world.is_main:
        (directory / "live").mkdir()
    barrier(world)
    exporter = Exporter(ours, shape, world, with_head=True)
    specs = [TensorSpec(part.hf, torch.float32, rule.hf_shape(part)) for rule in exporter.rules for part in rule.parts]
    write_live_shards(directory / "live", specs, exporter.tensors(torch.float32), world, SMALL)
    return {"official load": sorted(sum(gather_objects(wrong, world), []))}


def train(scratch: Path, world: World) -> None:
    """A training run's checkpoint, optimizer included, of an AV and of an AR that has three of its blocks."""
    from nla_megatron.training.checkpoint import Checkpoints
    from nla_megatron.training.module import TrainModule

    hf = scratch / SAVED[0] / "hf"
    shape = read_shape(hf)
    av, ar = build_verbalizer(shape, world, "float32"), build_reconstructor(shape.truncated(3), world, "float32")
    load_from_hf(av, str(hf), shape, world, with_head=True)
    load_from_hf(ar, str(hf), ar.shape, world, with_head=False)
    if ar.value_head is not None:
        ar.value_head.weight.data.mul_(2.0)
    modules = {
        name: TrainModule(model, world, OptimConfig(), 1, 1, "float32") for name, model in (("av", av), ("ar", ar))
    }
    Checkpoints(scratch / "run", "rl", world, keep=1).save(1, modules, {}, {})


def train_mixture(scratch: Path, world: World) -> None:
    """The same of a mixture over EP 2, whose experts have an optimizer of their own."""
    from nla_megatron.training.checkpoint import Checkpoints
    from nla_megatron.training.module import TrainModule

    hf = scratch / MIXTURES[0] / "hf"
    shape = read_shape(hf)
    av = build_verbalizer(shape, world, "float32")
    load_from_hf(av, str(hf), shape, world, with_head=True)
    module = TrainModule(av, world, OptimConfig(), 1, 1, "float32")
    Checkpoints(scratch / "mixture", "rl", world, keep=1).save(1, {"av": module}, {}, {})


def trained(scratch: Path, world: World) -> dict[str, Any]:
    """What is exported of that checkpoint, with the base model's configuration."""
    checkpoint, hf = scratch / "run" / "checkpoints" / "step_00000001", scratch / SAVED[0] / "hf"
    mixture = scratch / MIXTURES[0] / "hf"
    Export(
        scratch / "mixture" / "checkpoints" / "step_00000001" / "av", mixture, scratch / "mixture hf", world,
        shard_bytes=SMALL,
    ).run(world)  # fmt: skip
    for name in ("av", "ar"):
        Export(checkpoint / name, hf, scratch / "run" / f"{name} hf", world, shard_bytes=SMALL).run(world)
    if not world.is_main:
        return {}
    head = load_file(scratch / "run" / "ar hf" / "value_head.safetensors")["weight"]
    beyond = [name for name in different(hf, scratch / "run" / "ar hf") if not name.startswith(AR_LACKS)]
    return {
        "av": different(hf, scratch / "run" / "av hf"),
        "mixture": different(mixture, scratch / "mixture hf"),
        "ar": beyond,
        "blocks": read_shape(scratch / "run" / "ar hf").num_layers,
        "head": torch.equal(head, 2 * torch.eye(len(head))),
    }


def peak_extra(work: Callable[[], None]) -> int:
    """Bytes of resident memory that `work` takes at most above what the process has."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def memory(scratch: Path, world: World) -> dict[str, Any]:
    """The peak of every rank in an import and an export of a model that is much larger than its largest tensor."""
    hf = scratch / "big" / "hf"
    rules = [rule for rule in rules_of(BIG, with_head=True) if not rule.alias]
    specs = [TensorSpec(part.hf, torch.float32, rule.hf_shape(part)) for rule in rules for part in rule.parts]
    if world.is_main:
        hf.mkdir(parents=True)
        (hf / "config.json").write_text(json.dumps(config_from_shape(BIG)))
        write_shards(hf, ((spec.name, torch.randn(spec.shape)) for spec in specs), specs=specs)
    barrier(world)
    mcore, back = scratch / "big" / "mcore", scratch / "big" / "back"
    peaks = {
        "import": peak_extra(lambda: Import(hf, mcore, shard_bytes=10**9).run(world)),
        "export": peak_extra(lambda: Export(mcore, None, back, world, shard_bytes=10**9).run(world)),
    }
    return {
        "largest": max(spec.nbytes for spec in specs),
        "model": sum(spec.nbytes for spec in specs),
        "peaks": gather_objects(peaks, world),
        "different": different(hf, back) if world.is_main else [],
    }


def main(result: str, scratch_name: str) -> None:
    from megatron.core import parallel_state

    scratch = Path(scratch_name)
    world = initialise(ParallelConfig())
    found: dict[str, Any] = {}
    for name in MODELS:
        if world.is_main:
            family_model(name, scratch / name / "hf")
        barrier(world)
        convert(scratch, name, world)
    found["memory"] = memory(scratch, world)
    parallel_state.destroy_model_parallel()
    world = initialise(ParallelConfig(ep=2))
    train_mixture(scratch, world)
    parallel_state.destroy_model_parallel()
    world = initialise(ParallelConfig(tp=2, pp=2))
    train(scratch, world)
    for name in CUT:
        found[name] = on_layout(scratch, name, world)
    parallel_state.destroy_model_parallel()
    world = initialise(ParallelConfig())
    found["trained"] = trained(scratch, world)
    for name in SAVED:
        for naming in NAMINGS:
            directory = scratch / name
            source, out = directory / f"saved {naming}", directory / f"back {naming}"
            Export(source, directory / "hf", out, world, shard_bytes=SMALL).run(world)
    if world.is_main:
        for name in MODELS:
            backs = sorted(path for path in (scratch / name).iterdir() if path.name.startswith(("back", "live")))
            differences = {path.name: different(scratch / name / "hf", path) for path in backs}
            found[name] = {**found.get(name, {}), **differences}
        Path(result).write_text(json.dumps(found))
    barrier(world)


if __name__ == "__main__":
    main(*sys.argv[1:3])
