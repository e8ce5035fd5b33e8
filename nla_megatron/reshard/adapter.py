"""A LoRA policy's pairs alone, from Megatron's shards to vLLM's adapter: the base's weights do not move.

vLLM takes whole pairs and cuts them itself. What its cuts keep on each rank is recorded from its own layers, and only
that is sent; the rest of the tensors that vLLM is given is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from nla_megatron.conversion.peft import adapter_config, adapter_rules, spec_on
from nla_megatron.conversion.peft_format import PeftConfig
from nla_megatron.errors import ConfigError, ModelsDiffer
from nla_megatron.parallel.collectives import gather_objects
from nla_megatron.parallel.world import World
from nla_megatron.reshard.carriers import Need
from nla_megatron.reshard.execute import Gate
from nla_megatron.reshard.megatron_side import AdapterSources, TrainLayout, claims_of
from nla_megatron.reshard.regions import Piece, contiguous, whole
from nla_megatron.reshard.resharder import STAGING, Transfer, samplers_of
from nla_megatron.reshard.vllm_side import Copied, Trace, pieces_of, storage_of
from nla_megatron.types import ModelShape

Install = Callable[[Iterable[tuple[str, Tensor]], PeftConfig], None]
"""Takes the pairs by `peft`'s names, as `Engine.load_adapter` does."""


class AdapterResharder:
    """From the adapters of a live Megatron model to the vLLM of the same processes.

    An error in the middle of a load leaves the engine with the adapter that it had: vLLM is given whole ones only.

    Args:
        llm: an `LLM` that takes adapters, whose worker lives in this process, over all ranks.

    Raises:
        ConfigError: the engine was started without adapters.
        CheckpointError: the model has none.
        ModelsDiffer: vLLM adapts no such layer.
    """

    def __init__(self, model: Any, shape: ModelShape, llm: Any, world: World, staging: int = STAGING):
        worker = llm.llm_engine.model_executor.driver_worker.worker
        manager = getattr(worker.model_runner, "lora_manager", None)
        if manager is None:
            raise ConfigError("an engine without adapters", "one that takes them", "set rollout.lora=adapter")
        rules = adapter_rules(shape, spec_on(model))
        self.config = adapter_config(model)
        self.shapes = {part.hf: rule.hf_shape(part) for rule in rules for part in rule.parts}
        self.dtype: torch.dtype = worker.vllm_config.lora_config.lora_dtype
        needs = adapter_needs(manager._adapter_manager, self.shapes, str(self.dtype).removeprefix("torch."))
        tp = worker.vllm_config.parallel_config.tensor_parallel_size
        everyone = gather_objects(needs if world.rank < tp else None, world)
        traces = [Trace(one, {}, ()) for one in everyone if one is not None]
        claims = claims_of(shape, TrainLayout.of(world), rules=rules)
        samplers = samplers_of(traces, range(world.size))
        self.transfer = Transfer(AdapterSources(model), claims, samplers, world, staging)
        self.world, self.loads = world, 0

    def load(self, install: Install) -> None:
        """Collective: hand the pairs as they are now to `install`. Raises NotFinite, PeerLost, ReshardMismatch."""
        self.loads += 1
        into = self.transfer.run(lambda gate: _Pairs(self.shapes, self.dtype, self.world, gate), seed=self.loads)
        assert isinstance(into, _Pairs)
        install(into.tensors.items(), self.config)


class _Pairs:
    """Whole tensors, of which only what vLLM's cuts keep is written."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, world: World, gate: Gate):
        self.tensors = {name: torch.zeros(shape, dtype=dtype, device=world.device) for name, shape in shapes.items()}
        self.gate = gate

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    def finish(self, name: str) -> None:
        self.gate.arrived(name, self.tensors[name])


def adapter_needs(manager: Any, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> tuple[Need, ...]:
    """What this rank's layers keep of every pair; `manager` is vLLM's, `shapes` go by `peft`'s names.

    Raises:
        ModelsDiffer: an adapter of a layer that vLLM does not adapt.
    """
    from vllm.lora.utils import parse_fine_tuned_lora_name

    mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
    mapper = None if mapper is None else mapper.get_rename_mapper()
    names: dict[tuple[str, bool], str] = {}
    for name in shapes:
        names[parse_fine_tuned_lora_name(name, mapper)] = name
    needs: dict[str, list[Need]] = {}
    for module, layer in manager.modules.items():
        packed = manager.packed_modules.get(module, [])
        for is_a, cut in ((True, "slice_lora_a"), (False, "slice_lora_b")):
            here = [names.get((part, is_a)) for part in packed or [module]]
            sources = [None if one is None else torch.empty(shapes[one], device="meta") for one in here]
            if any(source is not None for source in sources):
                kept = _cut(layer, cut, sources, bool(packed))
                for one, source, view in zip(here, sources, kept, strict=True):
                    if one is not None:
                        needs[one] = _kept(one, source, view, shapes[one], dtype)
    if strangers := [name for name in shapes if name not in needs]:
        raise ModelsDiffer(
            f"an adapter of {strangers[0]}, which vLLM's {type(manager.model).__name__} does not adapt",
            "its linear layers", "set rollout.lora=merged",
        )  # fmt: skip
    return tuple(need for name in shapes for need in needs[name])


def _cut(layer: Any, method: str, sources: list[Tensor | None], packed: bool) -> list[Tensor | None]:
    """What the layer makes of its pairs before it copies them; of one rank it makes nothing."""
    if layer.tp_size == 1 or (packed and len(sources) != layer.n_slices):
        return sources
    cut = getattr(layer, method)
    return list(cut(sources)) if packed else [cut(sources[0])]


def _kept(name: str, source: Any, view: Any, shape: tuple[int, ...], dtype: str) -> list[Need]:
    pieces = None
    if view is not None and storage_of(view) == storage_of(source):
        pieces = pieces_of(Copied(name, name, view, view), shape)
    # What is no view is needed whole.
    found = [Piece(whole(name, shape), name, 0, contiguous(shape))] if pieces is None else pieces
    return [Need(piece, dtype) for piece in found]
