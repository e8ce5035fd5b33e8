"""`eval` of the task `sae`: a frozen model answers held-out prompts steered and left alone, with the same seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from nla_megatron import geometry
from nla_megatron.config.run_directory import check_run_directory, claim_run_directory, mark_done
from nla_megatron.config.schema import EvalConfig
from nla_megatron.contract.files import write_json, write_json_lines
from nla_megatron.conversion.hf import read_shape
from nla_megatron.errors import ConfigError
from nla_megatron.evaluation.answers import (
    EXAMPLES,
    REPORT,
    RESULTS,
    ROWS,
    check_rows,
    check_sampling,
    difference,
    held_out_task,
)
from nla_megatron.evaluation.steered_report import write_steered_report
from nla_megatron.evaluation.strengths import Steering, steering_of, strengths_of
from nla_megatron.models.builder import check_layout
from nla_megatron.models.strength_files import STEPS_PER_EPOCH
from nla_megatron.parallel.collectives import barrier, by_rank_0
from nla_megatron.parallel.progress import progress
from nla_megatron.parallel.world import World, data_parallel_size
from nla_megatron.rewards import make_reward
from nla_megatron.rollout.engine import Engine
from nla_megatron.tasks.sae import OPTIONS, SaeOptions, check_model, sae_options
from nla_megatron.tasks.sae_rows import names_of
from nla_megatron.tasks.steering import RewardOf, compared, steered
from nla_megatron.tasks.steering_report import Comparison
from nla_megatron.tasks.text import TextTask, evaluation_rows
from nla_megatron.types import Measured

REWARD = "reward"


def check(config: EvalConfig, world_size: int) -> None:
    """Everything that can be known before the first sample; raises a named error."""
    data_parallel_size(config.parallel, world_size)
    check_model(config.model)
    options, shape = sae_options(config.task), read_shape(config.model)
    if options.compare_samples != 1:
        raise ConfigError(
            f"{OPTIONS}.compare_samples={options.compare_samples} in eval", "the key samples", "set samples="
        )
    check_layout(shape, config.parallel, "forward")
    check_sampling(config, world_size)
    steering = steering_of(options, config.model, shape)
    task = held_out_task(config, options.text_task)
    check_rows(config, task)
    _check_epochs(config, steering)
    if config.reward.terms:
        reward = make_reward(config.reward, steering.steps_per_epoch, task.rows)
        reward.check_needs(task.measures, options.text_task.name)
    check_run_directory("eval", config)


def _check_epochs(config: EvalConfig, steering: Steering) -> None:
    """Raises ConfigError where a weight changes by epochs of a run of which nobody knows how long they were."""
    for label, term in config.reward.parts.items():
        if term.changes and term.change_by == "epoch" and steering.steps_per_epoch is None:
            key = f"reward.terms.{label}"
            raise ConfigError(
                f"{key}.change_by=epoch, and no {STEPS_PER_EPOCH} in {steering.predictor or 'fixed strengths'}",
                "the predictor of a run that says how long its epochs are",
                f"count in steps: {key}.change_by=step {key}.change_at=N",
            )  # fmt: skip


def run(config: EvalConfig, world: World) -> None:
    if world.is_main:
        claim_run_directory("eval", config)
    barrier(world)
    options, shape = sae_options(config.task), read_shape(config.model)
    steering, task = steering_of(options, config.model, shape), held_out_task(config, options.text_task)
    rows = evaluation_rows(task.rows, config.rows, config.seed)
    requests = task.requests(rows, config.seed, 0)
    strengths_NS = strengths_of(steering, [request.prompt_ids for request in requests], config, world)
    engine = Engine(
        config.model, shape, config.rollout, steering.interventions, world, task.tokenizer.end_ids,
        config.seed,
    )  # fmt: skip
    asked = steered(requests, strengths_NS, steering.interventions)
    with progress("eval", active=world.is_main, total=2 * len(asked), bar=config.logger.progress, unit="prompt") as bar:
        comparison = compared(
            task, engine, steering.interventions, asked, steering.step, reward_of(config, task, steering, world),
            config.samples, bar.advance,
        )  # fmt: skip
    if world.is_main:
        by_row = dict(zip(rows, strengths_NS.tolist(), strict=True))
        write(config, options, comparison, names_of(steering.interventions), by_row)
        mark_done(config)
    engine.close()


def reward_of(config: EvalConfig, task: TextTask, steering: Steering, world: World) -> RewardOf | None:
    """Rewards (N,) of what was measured, at a step of the run that trained; None where no reward is asked for."""
    if not config.reward.terms:
        return None
    once = partial(by_rank_0, world=world)
    reward = partial(make_reward, config.reward, steering.steps_per_epoch, task.rows, once)

    def rewards(measured: Measured, step: int) -> Tensor:
        # Each side has one of its own: a moving average that one side moves is no part of the other.
        return reward()(measured, step).rewards

    return rewards


def write(
    config: EvalConfig, options: SaeOptions, comparison: Comparison, names: Sequence[str],
    strengths: Mapping[int, Sequence[float]],
) -> None:  # fmt: skip
    """Figures, the numbers of every response, examples and the page; `strengths` are those of each row, by `names`."""
    out = Path(config.out)
    results, rows = results_of(config, options, comparison), rows_of(comparison)
    if config.compare is not None:
        name, prompts = _main(comparison), [str(row) for row in comparison.rows]
        over, interval = difference(config, name, rows, prompts)
        results |= {f"{name}_over_compared": over, f"{name}_over_compared_ci95": interval}
    examples = list(_examples(comparison, config.examples, names, strengths))
    write_json(out / RESULTS, results)
    write_json(out / ROWS, rows)
    write_json_lines(out / EXAMPLES, examples)
    write_steered_report(out / REPORT, _main(comparison), results, examples)


def results_of(config: EvalConfig, options: SaeOptions, comparison: Comparison) -> dict[str, Any]:
    """The numbers that a run logs of the same comparison, with intervals: prompts are resampled, as pairs."""
    prompts = [str(row) for row in comparison.rows]
    estimate = partial(geometry.mean_estimate, groups=prompts, n=config.bootstrap, seed=config.seed)
    logged = {name.removeprefix("eval_"): value for name, value in comparison.numbers().items()}
    # It takes responses to one prompt for independent; the intervals do not.
    logged.pop("reward_gain_error", None)
    results: dict[str, Any] = {
        "task": config.task.name,
        "prompts": options.text_task.name,
        "rows": len(set(prompts)),
        "samples": config.samples,
        "temperature": config.rollout.temperature,
        **logged,
        "steered_tokens": comparison.applied,
        "steering_failed": comparison.failed,
    }
    for name, (on_N, off_N) in _pairs(comparison).items():
        # Figures of text tasks are shares; a reward may be anything.
        bounds = geometry.ANYWHERE if name == REWARD else geometry.SHARE
        for key, values_N in ((name, on_N), (f"{name}_plain", off_N)):
            results[f"{key}_ci95"] = estimate(values_N, bounds=bounds).interval
        gain = estimate(on_N - off_N)
        results[f"{name}_gain"], results[f"{name}_gain_ci95"] = gain.value, gain.interval
    return {**results, "strengths": {name: dict(values) for name, values in comparison.strengths.items()}}


def rows_of(comparison: Comparison) -> dict[str, Any]:
    """By response: its row, its number among those to it, and the paired figures."""
    pairs = _pairs(comparison)
    return {
        "rows": list(comparison.rows),
        "samples": list(comparison.samples),
        **{name: on_N.tolist() for name, (on_N, _) in pairs.items()},
        **{f"{name}_plain": off_N.tolist() for name, (_, off_N) in pairs.items()},
    }


def _pairs(comparison: Comparison) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What is compared response by response, steered and plain (N,): the reward, where there is one, and the figure."""
    on, off = comparison.steered, comparison.plain
    pairs = {comparison.figure: (np.asarray(on.values, np.float64), np.asarray(off.values, np.float64))}
    if on.rewards is not None and off.rewards is not None:
        pairs = {REWARD: (np.asarray(on.rewards, np.float64), np.asarray(off.rewards, np.float64)), **pairs}
    return pairs


def _main(comparison: Comparison) -> str:
    """The figure on top of the page."""
    return next(iter(_pairs(comparison)))


def _examples(
    comparison: Comparison, count: int, names: Sequence[str], strengths: Mapping[int, Sequence[float]]
) -> Iterator[dict[str, Any]]:
    pairs, on, off = _pairs(comparison), comparison.steered, comparison.plain
    for index, row in enumerate(comparison.rows[:count]):
        yield {
            "row": row,
            **(comparison.places[index] if comparison.places else {}),
            "sample": comparison.samples[index],
            "prompt": comparison.prompts[index],
            "response": on.texts[index],
            "response_plain": off.texts[index],
            **{name: float(on_N[index]) for name, (on_N, _) in pairs.items()},
            **{f"{name}_plain": float(off_N[index]) for name, (_, off_N) in pairs.items()},
            "strengths": dict(zip(names, strengths[row], strict=True)),
        }
