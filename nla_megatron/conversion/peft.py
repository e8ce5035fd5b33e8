"""LoRA adapters between a live Megatron model, on any layout, and the directories of the `peft` library.

The family's rules say which projections a fused layer holds and how tensor parallelism cuts them; the matrices of an
adapter are Megatron parameters with rules of their own, derived from those.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nla_megatron.conversion.families import rules_of
from nla_megatron.conversion.live import Exporter
from nla_megatron.conversion.peft_format import CONFIG, WEIGHTS, AdapterReader, PeftConfig, read_peft_config
from nla_megatron.conversion.rules import Part, Rule
from nla_megatron.conversion.safetensors_file import Shard, ShardFile, TensorSpec
from nla_megatron.disk import room_on
from nla_megatron.errors import CheckpointError, RunDirectoryError, UnsupportedModel
from nla_megatron.models.lora import adapted, add_lora
from nla_megatron.models.lora_spec import FEED_FORWARD, LORA, PROJECTIONS, FusedLinear, LoraSpec, Slot
from nla_megatron.parallel.collectives import barrier, broadcast_object
from nla_megatron.parallel.world import World
from nla_megatron.types import ModelShape

_PROJECTION = re.compile(rf"^(?P<module>.+\.(?:self_attn|mlp)\.(?P<name>{'|'.join(PROJECTIONS)}))\.weight$")
_REMEDY = "merge the adapter into its base model and convert that"


@dataclass(frozen=True)
class _Site:
    """One projection of the model: its rule and part, the fused layer's name and the HF module's."""

    rule: Rule
    part: Part
    layer: str
    module: str
    projection: str

    @property
    def inputs_cut(self) -> bool:
        return self.rule.tp_axis == len(self.rule.view) - 1

    def rules(self, rank: int) -> Iterator[tuple[str, Rule]]:
        """(matrix, its rule): A (R, inputs) and B (outputs, R)."""
        outputs, inputs = self.rule.hf_shape(self.part)
        ours, theirs = f"{self.layer}.{LORA}.{self.projection}", f"base_model.model.{self.module}"
        for matrix, view, axis in (("A", (rank, inputs), 1), ("B", (outputs, rank), 0)):
            cut = axis if self.inputs_cut == (matrix == "A") else None
            yield matrix, Rule(f"{ours}.{matrix}", view, (Part(f"{theirs}.lora_{matrix}.weight"),), tp_axis=cut)


def _sites(shape: ModelShape) -> list[_Site]:
    found = []
    for rule in rules_of(shape, with_head=False):
        for part in rule.parts:
            if match := _PROJECTION.match(part.hf):
                layer = rule.megatron.removesuffix(".weight")
                found.append(_Site(rule, part, layer, match["module"], match["name"]))
    return found


def fused_layers(shape: ModelShape, tp: int) -> list[FusedLinear]:
    """Every linear layer that can be adapted, as one of `tp` ranks holds it."""
    layers: dict[str, list[_Site]] = {}
    for site in _sites(shape):
        layers.setdefault(site.layer, []).append(site)
    return [
        FusedLinear(
            name=name,
            slots=tuple(Slot(site.projection, site.module, site.rule.part_view(site.part, tp)) for site in sites),
            axis=sites[0].rule.slot_axis,
            inputs_cut=sites[0].inputs_cut,
        )
        for name, sites in layers.items()
    ]


def check_targets(spec: LoraSpec, shape: ModelShape) -> None:
    """Raises UnsupportedModel for feed-forward targets of a mixture of experts."""
    experts = [name for name in spec.targets if name in FEED_FORWARD] if shape.experts is not None else []
    if experts:
        raise UnsupportedModel(
            f"LoRA on {', '.join(experts)} of {shape.experts.count if shape.experts else 0} experts",
            "targets among q_proj, k_proj, v_proj, o_proj for a mixture of experts",
            "leave the feed-forward projections out of the targets",
        )


def attach(model: Any, shape: ModelShape, world: World, spec: LoraSpec, seed: int = 0) -> None:
    """Put fresh adapters on a model (or a list of chunks) and freeze the rest; the base's outputs stay as they are.

    Raises:
        UnsupportedModel: feed-forward targets of a mixture of experts, or adapters that are there already.
        LayoutError: sequence parallelism.
    """
    check_targets(spec, shape)
    add_lora(model, fused_layers(shape, world.tp), spec, seed)


@torch.no_grad()
def load_adapter(model: Any, directory: str | Path, shape: ModelShape, world: World) -> LoraSpec:
    """Put the adapter of a `peft` directory on a model; each rank reads only its own slices.

    Raises:
        MissingFile, CheckpointError: the files are incomplete, or do not fit the model.
        UnsupportedModel: what the adapter asks for is not honoured, by name.
    """
    config, reader = read_peft_config(directory), AdapterReader(Path(directory) / WEIGHTS)
    if config.dropout:
        raise UnsupportedModel(f"lora_dropout={config.dropout} in {Path(directory) / CONFIG}", "0", _REMEDY)
    sites = [site for site in _sites(shape) if site.module in reader.modules]
    spec = _spec_of(config, reader, sites, shape)
    for site in sites:
        reader.check(site.module, spec.rank_of(site.projection), site.rule.hf_shape(site.part))
    attach(model, shape, world, spec)
    parameters = _all_parameters(model)
    for site in sites:
        for matrix, rule in site.rules(spec.rank_of(site.projection)):
            if rule.megatron in parameters:
                axis, start, stop = rule.slice_of(rule.parts[0], world.tp_rank, world.tp)
                parameters[rule.megatron].copy_(reader.slice(site.module, matrix, axis, start, stop))
    return spec


def _spec_of(config: PeftConfig, reader: AdapterReader, sites: list[_Site], shape: ModelShape) -> LoraSpec:
    """One rank and alpha for each projection; blocks share a layout in checkpoints, so they must share those."""
    path = reader.path
    strangers = sorted(set(reader.modules) - {site.module for site in sites})
    if strangers or not sites:
        found = f"an adapter of {strangers[0]}" if strangers else "no adapter"
        raise UnsupportedModel(f"{found} in {path}", f"{', '.join(PROJECTIONS)} of {shape.num_layers} blocks", _REMEDY)
    here: dict[str, list[str]] = {}
    for site in sites:
        here.setdefault(site.projection, []).append(site.module)
    ranks, alphas = {}, {}
    for projection, modules in here.items():
        values = {(config.rank_of(module), config.alpha_of(module)) for module in modules}
        if len(modules) != shape.num_layers or len(values) != 1:
            raise UnsupportedModel(
                f"{projection} adapted in {len(modules)} of {shape.num_layers} blocks, with (rank, alpha) of "
                f"{sorted(values)}, in {path}: layers_to_transform, rank_pattern or alpha_pattern differ by block",
                "every block, with one rank and one alpha", _REMEDY,
            )  # fmt: skip
        ranks[projection], alphas[projection] = values.pop()
    return LoraSpec(
        rank=config.rank,
        alpha=config.alpha,
        targets=tuple(name for name in PROJECTIONS if name in here),
        rslora=config.rslora,
        ranks={name: rank for name, rank in ranks.items() if rank != config.rank},
        alphas={name: alpha for name, alpha in alphas.items() if alpha != config.alpha},
    )


def _all_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """The adapters' parameters of this rank, blocks numbered over the whole pipeline."""
    return {
        f"{layer}.{LORA}.{name}": parameter
        for layer, linear in adapted(model).items()
        for name, parameter in linear.lora.named_parameters()
    }


def adapter_rules(shape: ModelShape, spec: LoraSpec) -> list[Rule]:
    """The adapters' matrices as parameters of `global_parameters` made of tensors of `peft`'s files."""
    sites = [site for site in _sites(shape) if site.projection in spec.targets]
    return [rule for site in sites for _, rule in site.rules(spec.rank_of(site.projection))]


class _AdapterExporter(Exporter):
    """The matrices of the adapters by their names in `peft`'s files."""

    def __init__(self, model: Any, shape: ModelShape, world: World, spec: LoraSpec):
        self.world, self.parameters = world, _all_parameters(model)
        self.rules = adapter_rules(shape, spec)
        self.stage_of = self._stages()


def spec_on(model: Any) -> LoraSpec:
    """Of the adapters on a live model. Raises CheckpointError where there are none."""
    layers = adapted(model)
    if not layers:
        raise CheckpointError("a model without adapters", "one that `attach` or `load_adapter` has adapted", "adapt it")
    spec: LoraSpec = next(iter(layers.values())).lora.spec
    return spec


def adapter_config(model: Any, base: str | None = None) -> PeftConfig:
    """What `peft` needs to know of the adapters on a live model. Raises CheckpointError where there are none."""
    spec = spec_on(model)
    return PeftConfig(spec.rank, spec.alpha, spec.rslora, 0.0, base, spec.ranks, spec.alphas)


def adapter_exporter(model: Any, shape: ModelShape, world: World) -> Exporter:
    """An `Exporter` of the adapters alone, whole on every rank, by their names in `peft`'s files."""
    return _AdapterExporter(model, shape, world, spec_on(model))


def save_adapter(model: Any, directory: str | Path, shape: ModelShape, world: World, base: str) -> None:
    """Write the adapter as `peft` loads it, whole or not at all; collective, rank 0 writes, one tensor at a time.

    Args:
        directory: new, or of an adapter, which it replaces.
        base: the base model that the configuration names, a path or a hub's name.

    Raises:
        RunDirectoryError: `directory` holds something else than an adapter.
        DiskFull: no room.
    """
    out = Path(directory)
    strange = out.exists() and any(out.iterdir()) and not (out / CONFIG).is_file()
    if broadcast_object(strange if world.is_main else None, world):
        raise RunDirectoryError(f"{out}, which holds no adapter", "a new directory", "choose another one")
    spec, config = spec_on(model), adapter_config(model, base)
    exporter, partial = adapter_exporter(model, shape, world), Path(f"{directory}.partial")
    if world.is_main:
        with room_on(partial):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            _write_weights(partial, exporter)
            (partial / CONFIG).write_text(json.dumps(config.as_json(spec.targets), indent=2) + "\n")
            shutil.rmtree(out, ignore_errors=True)
            partial.rename(out)
    else:
        for _ in exporter.tensors(torch.float32):
            pass
    barrier(world)


def _write_weights(directory: Path, exporter: Exporter) -> None:
    specs = [TensorSpec(part.hf, torch.float32, rule.hf_shape(part)) for rule in exporter.rules for part in rule.parts]
    file = ShardFile(directory, Shard(WEIGHTS, tuple(specs)))
    try:
        for name, tensor in exporter.tensors(torch.float32):
            file.write(name, tensor)
    finally:
        file.close()


def merged_exporter(model: Any, shape: ModelShape, world: World, *, with_head: bool) -> Exporter:
    """An `Exporter` of the model as if its adapters were part of its weights."""
    return Exporter(model, shape, world, with_head=with_head, merge=True)
