"""A steered policy from a configuration, and training without samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from nla_megatron.config.run_directory import mark_done
from nla_megatron.config.schema import RlConfig
from nla_megatron.contract.tokenizer import load_tokenizer
from nla_megatron.conversion.hf import read_shape
from nla_megatron.conversion.live import load_from_hf
from nla_megatron.errors import ConfigError
from nla_megatron.interventions.spec import Intervention
from nla_megatron.models.interventions import intervene
from nla_megatron.models.strength import PredictorConfig
from nla_megatron.models.strength_files import read_weights, write_predictor
from nla_megatron.models.verbalizer import build_verbalizer
from nla_megatron.parallel.world import World
from nla_megatron.tasks.sae import SaeOptions, predictor_config, sae_options
from nla_megatron.tasks.sae_rows import TargetRows, read_targets
from nla_megatron.training.data_order import rows_of_step
from nla_megatron.training.loop import train
from nla_megatron.training.sides.base import Prompts
from nla_megatron.training.strengths import StrengthPolicy


def steered_policy(config: RlConfig, options: SaeOptions, world: World) -> StrengthPolicy:
    """The frozen model with its interventions and a predictor, new or the exported one that the options name."""
    shape, interventions = read_shape(config.model), options.steered()
    model = build_verbalizer(shape, world, config.dtype)
    load_from_hf(model, config.model, shape, world, with_head=True)
    intervene(model, interventions)
    form = predictor_config(options, interventions, shape)
    policy = StrengthPolicy(
        model, interventions, form, world, config.optim, config.steps, config.micro_batch_size, config.seed
    )
    if options.predictor_options.path is not None:
        policy.predictor.load_state_dict(read_weights(options.predictor_options.path))
    return policy


def check_fit(
    config: RlConfig, options: SaeOptions, interventions: Sequence[Intervention], form: PredictorConfig
) -> Prompts:
    """The rows with target strengths.

    Raises:
        ConfigError, MissingFile, ColumnError: no such rows, or some that cannot be learned from.
    """
    if not config.data:
        raise ConfigError(
            "no data= for the objective mse", "rows with a prompt and target_strengths", "add data=, or objective=rl"
        )
    if config.eval_every and config.held_out is None:
        raise ConfigError(
            f"eval_every={config.eval_every} without held_out", "rows with target_strengths", "add held_out="
        )
    found = _targets(config, options, interventions, form)
    longest = max(len(prompt) for rows in found if rows is not None for prompt in rows.prompts)
    return Prompts(len(found[0].prompts), longest, ())


def _targets(
    config: RlConfig, options: SaeOptions, interventions: Sequence[Intervention], form: PredictorConfig
) -> tuple[TargetRows, TargetRows | None]:
    tokenizer, count = load_tokenizer(config.model), sum(each.num_strengths for each in interventions)
    held_out = None
    if config.held_out is not None:
        held_out = read_targets(config.held_out, options, tokenizer, count, form, "held_out")
    return read_targets(config.data, options, tokenizer, count, form), held_out


def fit(config: RlConfig, world: World) -> None:
    """`rl` with the objective "mse": supervised steps of the predictor, with the checkpoints of any stage."""
    torch.manual_seed(config.seed)
    options = sae_options(config.task)
    interventions = options.steered()
    policy = steered_policy(config, options, world)
    rows, held_out = _targets(config, options, interventions, policy.predictor.config)

    def step(number: int) -> dict[str, float]:
        chosen = rows_of_step(len(rows.prompts), config.batch_size, number, config.seed)
        done = policy.fit([rows.prompts[row] for row in chosen], rows.targets_NS[chosen], number)
        scalars = {
            "loss": done.statistics["loss"], "lr": done.learning_rate, "grad_norm": done.grad_norm,
            "skipped": float(done.skipped),
        }  # fmt: skip
        if held_out is not None and config.eval_every and (number + 1) % config.eval_every == 0:
            found_NS = policy.strengths(held_out.prompts, None)
            scalars["eval_mse"] = float((found_NS - held_out.targets_NS).square().mean())
        return scalars

    train("rl", "rl", config, world, {"predictor": policy}, step)
    if config.export and world.is_main:
        training = {"steps": config.steps, "lr": config.optim.lr, "objective": "mse"}
        write_predictor(Path(config.out) / "predictor", policy.predictor, interventions, config.model, training)
    if world.is_main:
        mark_done(config)
