"""`sft`: the supervised warm start of the AV (text from vectors), of the AR (vectors from text), or of both at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nla_megatron.config.run_directory import check_run_directory, mark_done
from nla_megatron.config.schema import ArConfig, LoraConfig, OptimConfig, SftConfig
from nla_megatron.config.unread import Unread
from nla_megatron.contract.blocks import ReconstructorSpec
from nla_megatron.contract.sidecar import ModelSidecar
from nla_megatron.conversion.description import check_directory
from nla_megatron.conversion.heads import is_reconstructor, reconstructor_shape, resolved_spec
from nla_megatron.conversion.hf import read_shape
from nla_megatron.conversion.live import load_from_hf, load_reconstructor
from nla_megatron.conversion.projections import load_projections
from nla_megatron.errors import ColumnError
from nla_megatron.models.builder import beside_av, check_layout
from nla_megatron.models.interventions import intervene
from nla_megatron.models.quantized import NONE
from nla_megatron.models.reconstructor import Reconstructor
from nla_megatron.models.verbalizer import Verbalizer, build_verbalizer
from nla_megatron.parallel.world import World, data_parallel_size
from nla_megatron.tasks.lengths import longest_row
from nla_megatron.tasks.nla import MSE_SCALE, NlaTask
from nla_megatron.training.data_order import rows_of_step
from nla_megatron.training.export import export
from nla_megatron.training.loop import train
from nla_megatron.training.lora import adapt, check_lora, lora_record
from nla_megatron.training.losses import cross_entropy, make_reconstruction_loss
from nla_megatron.training.module import TrainModule, Update
from nla_megatron.types import ModelShape


@dataclass(frozen=True)
class Part:
    """One model of a run: what it starts from, what it learns from, and where it is written."""

    role: str
    model: str
    data: str
    optim: OptimConfig
    lora: LoraConfig
    out: str

    def task(self, config: SftConfig) -> NlaTask:
        """Its table, checked against its model."""
        return NlaTask.open(self.data, f"{self.role}_sft", self.model, config.curriculum if self.role == "av" else None)


def parts(config: SftConfig) -> list[Part]:
    """The models of a run: one, or with role both the AV and the AR."""
    if config.role != "both":
        return [Part(config.role, config.model, config.data, config.optim, config.lora, "hf")]
    assert config.ar_data is not None, "checked by the schema"
    return [
        Part("av", config.model, config.data, config.optim, config.lora, "av"),
        Part("ar", config.ar_model or config.model, config.ar_data, config.ar_optim, config.ar_lora, "ar"),
    ]


def check(config: SftConfig, world_size: int) -> None:
    """Everything that can be known before the first step; raises a named error."""
    data_parallel_size(config.parallel, world_size)
    for part in parts(config):
        task = part.task(config)
        shape = model_shape(part.role, part.model, task, config.reconstructor)
        check_directory(part.model, shape, with_head=part.role == "av")
        second = (config.role, part.role) == ("both", "ar")
        layout = beside_av(config.parallel) if second else config.parallel
        check_layout(shape, layout, stages="ar_stages" if second else "stages")
        check_lora(part.lora, shape, config.parallel, "ar_lora" if second else "lora")
        _check_length(_longest(part, task), config, task)
    check_run_directory("sft", config)


def unread(config: SftConfig) -> Iterator[Unread]:
    """What this run does not read."""
    if config.role != "both":
        yield "ar_optim", f"with role={config.role}"


def _longest(part: Part, task: NlaTask) -> int:
    """Tokens of the longest row that a part learns from, as `longest_row` finds it."""
    if part.role == "av":
        # Rows with as many activations have prompts of as many tokens.
        counts = task.table.activations
        return max(_longest_of(task, np.flatnonzero(counts == count).tolist()) for count in np.unique(counts))
    texts = task.gold_prompts
    return longest_row(len(texts), texts.__getitem__, lambda row: task.gold_text_batch([row]).longest)[1]


def _longest_of(task: NlaTask, rows: list[int]) -> int:
    """Tokens of the longest of rows that have the same prompt."""
    texts = task.gold_responses
    found = longest_row(len(rows), lambda at: texts[rows[at]], lambda at: len(task.gold_response_ids(rows[at])))
    return len(task.prompt_of(rows[0]).ids) + found[1]


def spec_of(config: ArConfig) -> ReconstructorSpec:
    """The configured AR as sidecars record it."""
    return ReconstructorSpec(config.pooling, config.projection_layers, config.dropout, config.layer)


def _resolved(directory: str, task: NlaTask, wanted: ArConfig | None) -> ReconstructorSpec:
    """How the AR that starts from a directory reads; one that is trained on keeps its ways where none are asked for."""
    unsaid = wanted is None or (is_reconstructor(directory) and wanted == ArConfig())
    spec = None if unsaid or wanted is None else spec_of(wanted)
    return resolved_spec(directory, spec, task.sidecar.extraction.layer_index)


def model_shape(role: str, directory: str, task: NlaTask, wanted: ArConfig | None = None) -> ModelShape:
    """The AV is the whole model, the AR its first blocks, up to the one that it reads.

    Args:
        wanted: how an AR is to read; None is what the directory's sidecar says.

    Raises:
        ConfigError, SidecarError, MissingFile, CheckpointError: an AR whose directory, sidecar and `wanted` disagree.
    """
    return read_shape(directory) if role == "av" else reconstructor_shape(directory, _resolved(directory, task, wanted))


def load_av(
    directory: str, task: NlaTask, world: World, dtype: str, seed: int = 0, dropout: float = 0.0, quantize: str = NONE
) -> Verbalizer:
    """The AV with its injection, from a base model's or an AV's directory.

    Args:
        seed, dropout: of projections that start afresh, and between the layers of any.
        quantize: how the blocks' linear layers hold their weights.
    """
    shape = model_shape("av", directory, task)
    model = build_verbalizer(shape, world, dtype, quantize)
    load_from_hf(model, directory, shape, world, with_head=True)
    intervene(model, task.interventions, seed, dropout)
    load_projections(model, directory)
    return model


def load_ar(
    directory: str, task: NlaTask, world: World, dtype: str, wanted: ArConfig | None = None, seed: int = 0,
    quantize: str = NONE,
) -> Reconstructor:  # fmt: skip
    """The AR, from a base model's or an AR's directory; `wanted` as in `model_shape`, `seed` of its dropout."""
    spec = _resolved(directory, task, wanted)
    return load_reconstructor(directory, reconstructor_shape(directory, spec), world, dtype, spec, seed, quantize)


def run(config: SftConfig, world: World) -> None:
    torch.manual_seed(config.seed)
    both = parts(config)
    tasks = {part.role: part.task(config) for part in both}
    modules = {part.role: _module(part, config, tasks[part.role], world) for part in both}
    updates = {role: _UPDATES[role](config, tasks[role], module) for role, module in modules.items()}

    def step(number: int) -> dict[str, float]:
        done = {role: update(number) for role, update in updates.items()}
        if config.role != "both":
            return _scalars(done[config.role])
        return {f"{role}_{name}": value for role, each in done.items() for name, value in _scalars(each).items()}

    train("sft", f"sft {config.role}", config, world, modules, step)
    if config.export:
        for part in both:
            sidecar = _sidecar(part, config, tasks[part.role], modules[part.role].model)
            export(modules[part.role].model, part.model, Path(config.out) / part.out, world, sidecar)
    if world.is_main:
        mark_done(config)


def _module(part: Part, config: SftConfig, task: NlaTask, world: World) -> TrainModule:
    if part.role == "av":
        dropout = task.projection_dropout
        model: Any = load_av(part.model, task, world, config.dtype, config.seed, dropout, part.lora.quantize)
    else:
        mine = beside_av(world) if config.role == "both" else world
        model = load_ar(part.model, task, mine, config.dtype, config.reconstructor, config.seed, part.lora.quantize)
    adapt(model, part.lora, world, config.seed)
    return TrainModule(model, world, part.optim, config.steps, config.micro_batch_size, config.dtype)


def _scalars(done: Update) -> dict[str, float]:
    return {
        **done.statistics,
        "lr": done.learning_rate,
        "grad_norm": done.grad_norm,
        "skipped": float(done.skipped),
    }


def _av_update(config: SftConfig, task: NlaTask, module: TrainModule) -> Callable[[int], Update]:
    def update(number: int) -> Update:
        rows = rows_of_step(task.table.n_rows, config.batch_size, number, config.seed)
        batch = task.response_batch(rows, [task.gold_response_ids(row) for row in rows], number)
        _check_length(batch.longest, config, task)
        return module.update(batch, cross_entropy(float(batch.fields["mask"].sum())), ("loss",), number)

    return update


def _ar_update(config: SftConfig, task: NlaTask, module: TrainModule) -> Callable[[int], Update]:
    loss = make_reconstruction_loss(config.ar_loss)

    def update(number: int) -> Update:
        rows = rows_of_step(task.table.n_rows, config.batch_size, number, config.seed)
        batch = task.gold_text_batch(rows)
        _check_length(batch.longest, config, task)
        return loss.update(module, batch, number)

    return update


_UPDATES: Mapping[str, Callable[[SftConfig, NlaTask, TrainModule], Callable[[int], Update]]] = {
    "av": _av_update,
    "ar": _ar_update,
}


def _check_length(longest: int, config: SftConfig, task: NlaTask) -> None:
    if longest > config.max_length:
        raise ColumnError(
            f"a row of {longest} tokens in {task.table.path}",
            f"at most max_length={config.max_length}",
            "raise max_length, or shorten the explanations",
        )


def _sidecar(part: Part, config: SftConfig, task: NlaTask, model: Any) -> ModelSidecar:
    training: dict[str, Any] = {
        "steps": config.steps,
        "batch_size": config.batch_size,
        "lr": part.optim.lr,
        "seed": config.seed,
        **lora_record(part.lora),
    }
    layer_index = task.sidecar.extraction.layer_index
    if part.role == "ar":
        own: dict[str, Any] = {"reconstructor": model.spec}
        training["ar_loss"] = dict(vars(config.ar_loss))
    else:
        own = {"injection": task.sidecar.injection}
    return ModelSidecar.from_contract(
        task.contract,
        role=part.role,
        stage="sl",
        base_checkpoint=task.sidecar.extraction.base_model,
        d_model=task.table.d_model,
        layer_index=layer_index,
        mse_scale=MSE_SCALE,
        pool=task.sidecar.pool,
        trained_on=(task.sidecar.dataset_id,),
        parent_checkpoints=(part.model,),
        training=training,
        **own,
    )
