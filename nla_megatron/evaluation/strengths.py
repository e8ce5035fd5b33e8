"""Whose strengths an evaluation of the task `sae` judges: a trained predictor's, or the same fixed ones everywhere.

Legend: N prompts, S strengths of all interventions side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from nla_megatron.config.run_directory import same_value
from nla_megatron.config.schema import EvalConfig
from nla_megatron.conversion.hf import read_shape
from nla_megatron.conversion.live import load_from_hf
from nla_megatron.errors import ConfigError
from nla_megatron.interventions.spec import Intervention
from nla_megatron.models.prompt_features import Ids, PromptFeatures, predicted
from nla_megatron.models.strength_files import (
    DESCRIPTION,
    STEPS_PER_EPOCH,
    Description,
    read_description,
    read_predictor,
    read_weights,
)
from nla_megatron.models.verbalizer import build_verbalizer
from nla_megatron.parallel.world import World
from nla_megatron.tasks.sae import OPTIONS, SaeOptions, check_places, predictor_config
from nla_megatron.types import ModelShape

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Steering:
    """What is judged.

    `step`: the training step that schedules over training, and rewards that change, stand at: the last one. `fixed`:
    the S strengths of every prompt, or None where `predictor`, an exported one's directory, says them.
    `steps_per_epoch`: of the run that trained, where it tells.
    """

    interventions: tuple[Intervention, ...]
    step: int
    fixed: tuple[float, ...] | None = None
    predictor: str = ""
    steps_per_epoch: float | None = None


def steering_of(options: SaeOptions, model: str, shape: ModelShape) -> Steering:
    """What the options say, everything about it checked that files can tell.

    Raises:
        ConfigError: no steering, neither a predictor nor fixed strengths, or both; another number of these than the
            interventions have; a predictor that was trained with another model or other interventions than are named.
        WidthError, MissingFile, CheckpointError, UnsupportedModel: as of `tasks.sae.check_steering`.
    """
    if not options.steering:
        raise ConfigError(
            f"{OPTIONS}.steering=false in eval", "something to steer",
            f"evaluate the model that such a run exports: task={options.text_task.name} model=RUN/hf",
        )  # fmt: skip
    path, fixed = options.predictor_options.path, tuple(options.fixed_strengths)
    if (path is None) != bool(fixed):
        raise ConfigError(
            f"{OPTIONS}.predictor.path={path} and {OPTIONS}.fixed_strengths={list(fixed)}", "one of the two",
            f"set {OPTIONS}.predictor.path=RUN/predictor, or {OPTIONS}.fixed_strengths=[1]",
        )  # fmt: skip
    return _fixed(options, fixed, shape) if path is None else _predicted(options, path, model, shape)


def _fixed(options: SaeOptions, given: tuple[float, ...], shape: ModelShape) -> Steering:
    interventions = options.steered()
    check_places(interventions, shape)
    if options.predictor_options.form:
        name = options.predictor_options.form[0]
        raise ConfigError(
            f"{OPTIONS}.predictor.{name} with {OPTIONS}.fixed_strengths", "no predictor beside them", f"drop {name}"
        )
    count = sum(each.num_strengths for each in interventions)
    if len(given) not in (1, count):
        raise ConfigError(
            f"{len(given)} {OPTIONS}.fixed_strengths", f"{count}, by {OPTIONS}.interventions, or one for all",
            f"correct {OPTIONS}.fixed_strengths",
        )  # fmt: skip
    return Steering(interventions, _last_step({}, interventions), given if len(given) == count else given * count)


def _predicted(options: SaeOptions, path: str, model: str, shape: ModelShape) -> Steering:
    described = read_description(path)
    named = options.steered() if options.interventions else described.interventions
    predictor_config(options, named, shape)
    read_weights(path)
    _check_trained_for(described, path, model, named)
    check_places(named, shape)
    return Steering(
        named, _last_step(described.training, named), predictor=path,
        steps_per_epoch=described.training.get(STEPS_PER_EPOCH),
    )  # fmt: skip


def _check_trained_for(described: Description, path: str, model: str, named: Sequence[Intervention]) -> None:
    """Raises ConfigError where a predictor was trained with something else: its strengths would mean nothing here."""
    pairs = list(zip(described.interventions, named, strict=False))
    told: list[tuple[str, Any, Any]] = [
        ("model", described.base_model, model),
        (f"{OPTIONS}.interventions", len(described.interventions), len(named)),
        *(
            (f"{OPTIONS}.interventions[{number}].{each.name}", getattr(trained, each.name), getattr(wanted, each.name))
            for number, (trained, wanted) in enumerate(pairs)
            for each in fields(Intervention)
        ),
    ]
    for key, trained, wanted in told:
        if not same_value(trained, wanted):
            raise ConfigError(
                f"{key}={wanted} for the predictor {path}", f"{trained}, with which it was trained",
                f"use that; what only moved to another place is corrected in {path}/{DESCRIPTION}",
            )  # fmt: skip


def _last_step(training: Mapping[str, Any], interventions: Sequence[Intervention]) -> int:
    """Of the run that trained, else of the schedules."""
    if training.get("steps") is not None:
        return int(training["steps"]) - 1
    return max(each.schedule.steps for each in interventions)


def strengths_of(steering: Steering, prompts: Sequence[Ids], config: EvalConfig, world: World) -> Tensor:
    """(N, S) on the CPU, the same on every rank; collective. The frozen model that is read is gone afterwards."""
    if steering.fixed is not None:
        return torch.tensor(steering.fixed).expand(len(prompts), -1)
    shape = read_shape(config.model)
    model = build_verbalizer(shape, world, config.dtype)
    load_from_hf(model, config.model, shape, world, with_head=True)
    predictor, _ = read_predictor(steering.predictor)
    with torch.no_grad():
        features = PromptFeatures([model], world, config.micro_batch_size)
        return predicted(predictor.to(world.device), features, prompts).cpu()
