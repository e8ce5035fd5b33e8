"""`eval`: each task's evaluation by the task's name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from nla_megatron.config.schema import EvalConfig, RewardConfig
from nla_megatron.config.unread import Unread
from nla_megatron.contract.journal import read_object
from nla_megatron.errors import ConfigError
from nla_megatron.evaluation import answers, held_out, steered, told
from nla_megatron.evaluation.runs import FIGURES
from nla_megatron.parallel.world import World
from nla_megatron.rollout.plugin import check_installed

EVALUATIONS: dict[str, ModuleType] = {"nla": held_out, "math": answers, "lexical": answers, "sae": steered}
"""By task, the module with `check` and `run`."""
REWARDED = ("sae",)
"""Tasks whose evaluation reads the key `reward`."""


def check(config: EvalConfig, world_size: int) -> None:
    """Everything that can be known before the first sample; raises a named error."""
    if config.task.name not in EVALUATIONS:
        raise ConfigError(f"task.name={config.task.name!r}", f"one of {', '.join(EVALUATIONS)}", "correct task=")
    if config.reward != RewardConfig() and config.task.name not in REWARDED:
        raise ConfigError(
            f"reward= with task={config.task.name}, whose evaluation does not read it",
            f"a reward with task={', '.join(REWARDED)} alone", "drop reward=",
        )  # fmt: skip
    check_installed()
    EVALUATIONS[config.task.name].check(config, world_size)


def unread(config: EvalConfig) -> Iterator[Unread]:
    """What this evaluation does not read."""
    name = config.task.name
    keys: tuple[str, ...] = ("model",) if name == "nla" else ("av", "ar", "frozen_ar", "quote_words")
    if name == "sae":
        keys += tuple(f"task.options.{key}" for key in ("objective", "reference", "prompt_column"))
    elif name != "nla":
        keys += ("dtype",)
    yield from ((key, f"in eval task={name}") for key in keys)
    if name == "sae" and config.task.options.get("fixed_strengths"):
        yield "dtype", "with task.options.fixed_strengths"


def run(config: EvalConfig, world: World) -> None:
    EVALUATIONS[config.task.name].run(config, world)
    if world.is_main:
        print(told.table(read_object(Path(config.out) / FIGURES)), flush=True)
