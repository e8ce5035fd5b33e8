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
from nla_megatron.training.tally import check_learns, recorded, restore

_SHOWN = ("loss", "reward", "av_loss", "ar_loss")
"""What a progress bar says of a step."""
Step = Callable[[int], Mapping[str, float]]
"""One training step, 0-based; returns the scalars to log."""


def train(
    command: str, name: str, config: TrainingStageConfig, world: World, modules: Mapping[str, Stateful], step: Step,
    *, on_resume: Callable[[], None] = lambda: None, memory: Mapping[str, Memory] | None = None,
) -> None:  # fmt: skip
    """Run the remaining steps of a stage, saving every `save_every` and `keep_every` steps and at the end.

    Raises NotFinite, on all ranks, where what should learn skipped every update: nothing is saved as finished then.

    Args:
        on_resume: called after weights came from a checkpoint, before the first step.
        memory: what carries numbers from step to step, beside the modules.
    """
    if world.is_main:
        claim_run_directory(command, config)
    barrier(world)
    checkpoints = Checkpoints(config.out, name, world, config.keep_checkpoints, config.keep_every)
    schedule: dict[str, Any] = {"steps": config.steps, "seed": config.seed}
    start = checkpoints.resume(modules, schedule, memory or {})
    if start:
        restore(modules, checkpoints.found.get("updates", {}), start)
        on_resume()
    logger = make_logger(config.logger, config.out, name, active=world.is_main, resume_step=start or None)
    bar = progress(name, active=world.is_main, total=config.steps, initial=start, bar=config.logger.progress)
    with logger, bar:
        for number in range(start, config.steps):
            scalars = step(number)
            logger.log(number, scalars)
            check_learns(modules, last=number + 1 == config.steps)
            bar.advance(1, **{key: scalars[key] for key in _SHOWN if key in scalars})
            if _is_saved(config, number + 1):
                checkpoints.save(number + 1, modules, {**schedule, "updates": recorded(modules)}, memory or {})


def _is_saved(config: TrainingStageConfig, step: int) -> bool:
    intervals = (config.save_every, config.keep_every)
    return step == config.steps or any(every and step % every == 0 for every in intervals)
