"""What every training stage does around its own step: resume, log, save, show progress."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nla_megatron.config.run_directory import claim_run_directory
from nla_megatron.config.schema import TrainingStageConfig
from nla_megatron.parallel.collectives import barrier
from nla_megatron.parallel.progress import progress
from nla_megatron.parallel.world import World
from nla_megatron.training.checkpoint import Checkpoints, Memory, Stateful
from nla_megatron.training.metrics import make_logger

Step = Callable[[int], Mapping[str, float]]
"""One training step, 0-based; returns the scalars to log."""


def train(
    command: str, name: str, config: TrainingStageConfig, world: World, modules: Mapping[str, Stateful], step: Step,
    *, on_resume: Callable[[], None] = lambda: None, memory: Mapping[str, Memory] | None = None,
) -> None:  # fmt: skip
    """Run the remaining steps of a stage, saving every `save_every` steps and at the end.

    Args:
        on_resume: called after weights came from a checkpoint, before the first step.
        memory: what carries numbers from step to step, beside the modules.
    """
    if world.is_main:
        claim_run_directory(command, config)
    barrier(world)
    checkpoints = Checkpoints(config.out, name, world, config.keep_checkpoints)
    schedule: dict[str, Any] = {"steps": config.steps, "seed": config.seed}
    start = checkpoints.resume(modules, schedule, memory or {})
    if start:
        on_resume()
    logger = make_logger(config.logger, config.out, name, active=world.is_main, resume_step=start or None)
    bar = progress(name, active=world.is_main, total=config.steps, initial=start, bar=config.logger.progress)
    with logger, bar:
        for number in range(start, config.steps):
            scalars = step(number)
            logger.log(number, scalars)
            bar.advance(1, **{key: scalars[key] for key in ("loss", "reward") if key in scalars})
            if (number + 1) % config.save_every == 0 or number + 1 == config.steps:
                checkpoints.save(number + 1, modules, schedule, memory or {})
