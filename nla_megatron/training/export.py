"""A trained model as an ordinary Hugging Face directory, appearing whole or not at all."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nla_megatron.contract.sidecar import ModelSidecar, write_model_sidecar
from nla_megatron.conversion.heads import write_reconstructor_head
from nla_megatron.conversion.hf import SHARD_BYTES, copy_companions, read_config, truncated_config
from nla_megatron.conversion.live import Exporter
from nla_megatron.conversion.live_shards import write_live_shards
from nla_megatron.conversion.peft import merged_exporter, save_adapter
from nla_megatron.conversion.projections import write_projections
from nla_megatron.conversion.safetensors_file import TensorSpec
from nla_megatron.models.heads import head_shapes
from nla_megatron.models.lora import adapted
from nla_megatron.models.projections import whole_projections
from nla_megatron.models.reconstructor import Reconstructor
from nla_megatron.parallel.collectives import barrier
from nla_megatron.parallel.world import World

ADAPTERS = "adapters"
"""Where a run keeps the adapters alone."""


def export(
    model: Any, companions: str, out: str | Path, world: World, sidecar: ModelSidecar | None = None,
    config: dict[str, Any] | None = None, shard_bytes: int = SHARD_BYTES,
) -> None:  # fmt: skip
    """Write `model` with the tokenizer files of `companions`; collective, the ranks share the shards out.

    Adapters are merged into the weights; those of a whole language model are also written alone, as `peft` reads them,
    to `adapters/` beside `out`, under the same name.

    Args:
        companions: a Hugging Face directory whose config (cut to the AR's depth for an AR) and tokenizer go along.
        sidecar: the NLA sidecar; None for a plain language model.
        config: config.json for a model that has no directory yet.
    """
    is_ar = isinstance(model, Reconstructor)
    out, partial = Path(out), Path(f"{out}.partial")
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier(world)
    head = _head(model, world) if is_ar else None
    projections = {} if is_ar else whole_projections(model, world)
    dtype = model.config.params_dtype
    has_adapters = bool(adapted(model))
    exporter = (merged_exporter if has_adapters else Exporter)(model, model.shape, world, with_head=not is_ar)
    specs = [TensorSpec(part.hf, dtype, rule.hf_shape(part)) for rule in exporter.rules for part in rule.parts]
    write_live_shards(partial, specs, exporter.tensors(dtype), world, shard_bytes)
    if world.is_main:
        written = config or read_config(companions)
        copy_companions(
            Path(companions), partial, truncated_config(written, model.shape.num_layers) if is_ar else written, dtype
        )
        if head is not None:
            layer_index = None if sidecar is None else sidecar.extraction.layer_index
            write_reconstructor_head(partial, head, model.spec, layer_index)
        write_projections(partial, projections)
        if sidecar is not None:
            # Stamped once: the adapters below carry the same time.
            sidecar = write_model_sidecar(partial, sidecar)
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    barrier(world)
    if has_adapters and not is_ar:
        save_adapter(model, out.parent / ADAPTERS / out.name, model.shape, world, companions)
        if world.is_main:
            write_projections(out.parent / ADAPTERS / out.name, projections)
            if sidecar is not None:
                write_model_sidecar(out.parent / ADAPTERS / out.name, sidecar)


def _head(model: Reconstructor, world: World) -> dict[str, torch.Tensor]:
    """The head's tensors on every rank, from the last pipeline stage."""
    from megatron.core import parallel_state

    own = {} if model.value_head is None else model.value_head.state_dict()
    head = {}
    for name, shape in head_shapes(model.shape, model.spec).items():
        head[name] = own[name].clone() if name in own else torch.empty(shape, device=world.device)
        if world.pp > 1:
            group = parallel_state.get_pipeline_model_parallel_group()
            dist.broadcast(head[name], src=dist.get_global_rank(group, world.pp - 1), group=group)
    return head


def descended(sidecar: ModelSidecar, stage: str, parent: str, data: str, training: dict[str, Any]) -> ModelSidecar:
    """The sidecar of a model trained on from `parent`."""
    return replace(
        sidecar, stage=stage, parent_checkpoints=(parent,), trained_on=(*sidecar.trained_on, data), training=training,
        created_at="", git_commit="",
    )  # fmt: skip
