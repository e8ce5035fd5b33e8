"""`sft`: the supervised warm start of the AV (text from vectors) and of the AR (vectors from text)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from nla_megatron.config.run_directory import check_run_directory, mark_done
from nla_megatron.config.schema import SftConfig
from nla_megatron.contract.sidecar import InjectionSpec, ModelSidecar
from nla_megatron.conversion.hf import read_shape
from nla_megatron.conversion.live import load_from_hf, load_reconstructor
from nla_megatron.errors import ColumnError
from nla_megatron.models.builder import check_layout
from nla_megatron.models.interventions import intervene
from nla_megatron.models.reconstructor import Reconstructor
from nla_megatron.models.verbalizer import Verbalizer, build_verbalizer
from nla_megatron.parallel.world import World, data_parallel_size
from nla_megatron.tasks.nla import MSE_SCALE, NlaTask
from nla_megatron.training.data_order import rows_of_step
from nla_megatron.training.export import export
from nla_megatron.training.loop import train
from nla_megatron.training.losses import cross_entropy, reconstruction
from nla_megatron.training.module import TrainModule, Update
from nla_megatron.types import ModelShape


def table_stage(config: SftConfig) -> str:
    return f"{config.role}_sft"


def check(config: SftConfig, world_size: int) -> None:
    """Everything that can be known before the first step; raises a named error."""
    data_parallel_size(config.parallel, world_size)
    task = NlaTask.open(config.data, table_stage(config), config.model)
    check_layout(model_shape(config.role, config.model, task), config.parallel)
    check_run_directory("sft", config)


def model_shape(role: str, directory: str, task: NlaTask) -> ModelShape:
    """The AV is the whole model, the AR its first K+1 blocks."""
    shape = read_shape(directory)
    return shape.truncated(task.sidecar.extraction.layer_index + 1) if role == "ar" else shape


def load_av(directory: str, task: NlaTask, world: World, dtype: str) -> Verbalizer:
    """The AV with its injection, from a base model's or an AV's directory."""
    shape = model_shape("av", directory, task)
    model = build_verbalizer(shape, world, dtype)
    load_from_hf(model, directory, shape, world, with_head=True)
    intervene(model, task.interventions)
    return model


def load_ar(directory: str, task: NlaTask, world: World, dtype: str) -> Reconstructor:
    """The AR, from a base model's or an AR's directory."""
    return load_reconstructor(directory, model_shape("ar", directory, task), world, dtype)


def run(config: SftConfig, world: World) -> None:
    torch.manual_seed(config.seed)
    task = NlaTask.open(config.data, table_stage(config), config.model)
    model = (load_av if config.role == "av" else load_ar)(config.model, task, world, config.dtype)
    module = TrainModule(model, world, config.optim, config.steps, config.micro_batch_size, config.dtype)
    update = (_av_update if config.role == "av" else _ar_update)(config, task, module)

    def step(number: int) -> dict[str, float]:
        done = update(number)
        return {
            "loss": done.statistics["loss"],
            "lr": done.learning_rate,
            "grad_norm": done.grad_norm,
            "skipped": float(done.skipped),
        }

    train("sft", f"sft {config.role}", config, world, {config.role: module}, step)
    if config.export:
        export(model, config.model, Path(config.out) / "hf", world, _sidecar(config, task))
    if world.is_main:
        mark_done(config)


def _av_update(config: SftConfig, task: NlaTask, module: TrainModule) -> Callable[[int], Update]:
    def update(number: int) -> Update:
        rows = rows_of_step(task.table.n_rows, config.batch_size, number, config.seed)
        batch = task.response_batch(rows, [task.gold_response_ids(row) for row in rows])
        _check_length(batch.longest, config)
        return module.update(batch, cross_entropy(float(batch.fields["mask"].sum())), ("loss",), number)

    return update


def _ar_update(config: SftConfig, task: NlaTask, module: TrainModule) -> Callable[[int], Update]:
    def update(number: int) -> Update:
        rows = rows_of_step(task.table.n_rows, config.batch_size, number, config.seed)
        batch = task.gold_text_batch(rows)
        _check_length(batch.longest, config)
        return module.update(batch, reconstruction(len(rows)), ("loss",), number)

    return update


def _check_length(longest: int, config: SftConfig) -> None:
    if longest > config.max_length:
        raise ColumnError(
            f"a row of {longest} tokens in {config.data}",
            f"at most max_length={config.max_length}",
            "raise max_length, or shorten the explanations",
        )


def _sidecar(config: SftConfig, task: NlaTask) -> ModelSidecar:
    spec = task.intervention
    return ModelSidecar.from_contract(
        task.contract,
        role=config.role,
        stage="sl",
        base_checkpoint=task.sidecar.extraction.base_model,
        d_model=task.table.d_model,
        layer_index=task.sidecar.extraction.layer_index,
        injection=InjectionSpec(spec.method, spec.layer, spec.scale) if config.role == "av" else None,
        mse_scale=MSE_SCALE,
        trained_on=(task.sidecar.dataset_id,),
        parent_checkpoints=(config.model,),
        training={"steps": config.steps, "batch_size": config.batch_size, "lr": config.optim.lr, "seed": config.seed},
    )
