"""`eval` of tasks whose policy is a plain language model: its responses to held-out prompts, and the task's figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nla_megatron import geometry
from nla_megatron.config.run_directory import check_run_directory, claim_run_directory, mark_done
from nla_megatron.config.schema import EvalConfig, TaskConfig
from nla_megatron.contract.files import write_json, write_json_lines
from nla_megatron.contract.journal import read_object
from nla_megatron.conversion.description import check_directory
from nla_megatron.conversion.hf import read_shape
from nla_megatron.errors import ConfigError, MissingFile
from nla_megatron.evaluation.answers_report import write_answers_report
from nla_megatron.models.builder import check_rollout_layout
from nla_megatron.parallel.collectives import barrier
from nla_megatron.parallel.progress import progress
from nla_megatron.parallel.world import World, data_parallel_size
from nla_megatron.rollout.engine import Engine
from nla_megatron.tasks.text import Data, TextTask, no_vectors, open_task
from nla_megatron.types import Measured, Rollout

RESULTS, ROWS, EXAMPLES, REPORT = "eval.json", "rows.json", "examples.jsonl", "report.html"
CORRECT = "correct.jsonl"
"""What is right of each row, as the reward `token_utilisation` reads it."""
_AT_ONCE = 256
"""Prompts between two advances of the progress bar."""


def check(config: EvalConfig, world_size: int) -> None:
    """Everything that can be known before the first sample; raises a named error."""
    data_parallel_size(config.parallel, world_size)
    if not config.model:
        raise ConfigError(
            f"no model for the task {config.task.name}", "a Hugging Face directory", "add model=DIRECTORY"
        )
    check_sampling(config, world_size)
    check_rows(config, held_out_task(config, config.task))
    check_run_directory("eval", config)


def check_sampling(config: EvalConfig, world_size: int) -> None:
    """Raises ConfigError or LayoutError where the sampler cannot be started, or would not sample what is asked for."""
    if config.samples > 1 and config.rollout.temperature == 0:
        raise ConfigError(
            f"samples={config.samples} with rollout.temperature=0", "a temperature above 0",
            "greedy samples are all alike: set rollout.temperature=1, or samples=1",
        )  # fmt: skip
    shape = read_shape(config.model)
    check_rollout_layout(shape, config.rollout.tp, world_size, config.rollout.expert_parallel)
    check_directory(config.model, shape)


def check_rows(config: EvalConfig, task: TextTask) -> None:
    """Raises ConfigError, LayoutError or MissingFile: too few rows, too long ones, or no evaluation to compare with."""
    if min(config.rows, task.rows) < 2:
        raise ConfigError(f"{min(config.rows, task.rows)} rows to evaluate", "at least 2", "raise rows=, or add data")
    limit = min(config.rollout.max_model_len, read_shape(config.model).max_positions)
    task.check_length(config.rollout.max_new_tokens, limit)
    if config.compare is not None and not (Path(config.compare) / ROWS).is_file():
        raise MissingFile(
            f"no {Path(config.compare) / ROWS}", "a finished evaluation's directory", "run that evaluation first"
        )


def run(config: EvalConfig, world: World) -> None:
    if world.is_main:
        claim_run_directory("eval", config)
    barrier(world)
    task = held_out_task(config, config.task)
    engine = Engine(
        config.model, read_shape(config.model), config.rollout, (), world, task.tokenizer.end_ids, config.seed
    )
    requests = task.requests(_chosen_rows(config, task), config.seed, 0)
    rollouts: list[Rollout] = []
    with progress("eval", active=world.is_main, total=len(requests), bar=config.logger.progress, unit="prompt") as bar:
        for start in range(0, len(requests), _AT_ONCE):
            part = requests[start : start + _AT_ONCE]
            rollouts += engine.generate(part, no_vectors, config.samples).rollouts
            bar.advance(len(part))
    if world.is_main:
        _write(config, task, task.measure(rollouts))
        mark_done(config)
    engine.close()


def held_out_task(config: EvalConfig, text_task: TaskConfig) -> TextTask:
    """A text task on the rows to evaluate. Raises ConfigError where there are none, and what `open_task` raises."""
    task = open_task(text_task, Data(held_out=config.data, training=False), config.model, config.seed)
    if task is None:
        raise ConfigError(
            f"no rows to evaluate the task {text_task.name} on", "data=, or the task's own held-out rows",
            "add data=FILE, or task.options.held_out",
        )  # fmt: skip
    return task


def _chosen_rows(config: EvalConfig, task: TextTask) -> list[int]:
    order: list[int] = np.random.default_rng([config.seed, 5]).permutation(task.rows)[: config.rows].tolist()
    return order


def _write(config: EvalConfig, task: TextTask, measured: Measured) -> None:
    out, (name, value_N) = Path(config.out), task.main(measured)
    prompts = [str(rollout.group) for rollout in measured.rollouts]
    results: dict[str, Any] = {
        "task": config.task.name,
        "rows": len(set(prompts)),
        "samples": config.samples,
        "temperature": config.rollout.temperature,
        **task.figures(measured),
        f"{name}_ci95": geometry.mean_estimate(
            value_N.numpy(), prompts, config.bootstrap, config.seed, geometry.SHARE
        ).interval,
    }
    rows = {
        "rows": [rollout.row for rollout in measured.rollouts],
        "samples": [rollout.sample for rollout in measured.rollouts],
        **{key: values.tolist() for key, values in measured.values.items()},
        name: value_N.tolist(),
    }
    if config.compare is not None:
        results[f"{name}_gain"], results[f"{name}_gain_ci95"] = difference(config, name, rows, prompts)
    examples = [task.example(measured, index) for index in range(min(config.examples, len(measured.rollouts)))]
    write_json(out / RESULTS, results)
    write_json(out / ROWS, rows)
    write_json_lines(out / EXAMPLES, examples)
    if "correct" in measured.values:
        write_json_lines(out / CORRECT, _correct_by_row(task, measured))
    write_answers_report(out / REPORT, config.task.name, name, results, examples)


def _correct_by_row(task: TextTask, measured: Measured) -> list[dict[str, Any]]:
    """The share of right responses of each row, in the rows' order."""
    by_row: dict[int, list[float]] = {}
    for rollout, correct in zip(measured.rollouts, measured.values["correct"].tolist(), strict=True):
        by_row.setdefault(rollout.row, []).append(correct)
    return [
        {"row": row, **task.place(row), "correct": sum(values) / len(values)} for row, values in sorted(by_row.items())
    ]


def difference(
    config: EvalConfig, name: str, rows: Mapping[str, Any], prompts: Sequence[str]
) -> tuple[float, list[float]]:
    """A figure of this evaluation over another's of the same responses' places: the mean and its 95 % interval.

    Raises:
        ConfigError: the other one has other rows, or not this figure.
    """
    other = read_object(Path(str(config.compare)) / ROWS, ("rows",))
    same = all(other.get(key) == rows[key] for key in ("rows", "samples"))
    if not same or name not in other:
        raise ConfigError(
            f"other rows in {config.compare}", "an evaluation of the same rows in the same task",
            "use the same data=, rows=, samples= and seed=",
        )  # fmt: skip
    gains_N = np.asarray(rows[name]) - np.asarray(other[name])
    # Samples of one prompt are alike, so prompts are resampled.
    found = geometry.mean_estimate(gains_N, prompts, config.bootstrap, config.seed)
    return found.value, found.interval
