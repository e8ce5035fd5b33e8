"""What `eval` can be told of a finished `rl` run: whose models it reads, on which rows, in which task."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from nla_megatron.config.multirun import literal
from nla_megatron.config.schema import TaskConfig
from nla_megatron.evaluation.runs import Run


@dataclass(frozen=True)
class TrainedModel:
    """A model that a run trains: the key that names it in `rl` and in `eval`, where a run exports it, and its name in
    checkpoints.

    `sidecar`: it is told apart by an NLA sidecar.
    """

    key: str
    exported: str
    module: str
    sidecar: bool


_NLA = (TrainedModel("av", "av", "av", True), TrainedModel("ar", "ar", "ar", True))
_PLAIN = (TrainedModel("model", "hf", "policy", False),)
_STEERED = (TrainedModel("task.options.predictor.path", "predictor", "predictor", False),)
_LENGTHS = ("response_tokens_", "truncated")
_MATH = (
    "accuracy", "accuracy_strict", "accuracy_ci95_", "accuracy_by_level.", "accuracy_by_source.", "format_rate",
    "answer_found", "thinking_tokens_", "pass_at_", "references_unreadable", *_LENGTHS,
)  # fmt: skip
_LEXICAL = ("richness", "richness_ci95_", "words_", *_LENGTHS)
# Each figure of a text task, that of the plain side, and what steering gains.
_OF_BOTH_SIDES = tuple(f"{name.rstrip('_')}_" for name in (*_MATH, *_LEXICAL) if not name.endswith("."))
FIGURES_OF: Mapping[str, tuple[str, ...]] = {
    "nla": ("fve_", "extraction_failed_"),
    "math": _MATH,
    "lexical": _LEXICAL,
    "sae": (
        "reward", "reward_", "response_length", "response_length_", "steered_tokens", "steering_failed", "strengths.",
        *_MATH, *_LEXICAL, *_OF_BOTH_SIDES,
    ),
}  # fmt: skip
"""By task that `eval` knows, the figures that an evaluation will have; `_` and `.` end what only begins a name."""


def will_have(task: str, metric: str, names: Collection[str] = ()) -> bool:
    """Whether an evaluation of a task that `eval` knows, with such `names`, has such a figure."""
    if metric.startswith("named_"):
        condition, _, rest = metric.partition(".")
        name, _, what = rest.rpartition(".")
        return condition in ("named_av", "named_shuffled", "named_gold") and name in names and what in ("found", "of")
    return any(metric.startswith(name) if name[-1] in "_." else metric == name for name in FIGURES_OF[task])


def models_of(run: Run) -> tuple[TrainedModel, ...]:
    return {"nla": _NLA, "sae": _STEERED}.get(_task(run).name, _PLAIN)


def can_be_evaluated(run: Run, data: str | None) -> bool:
    """Whether `eval` knows the task, and there are rows that the run did not train on: `data`, or its own."""
    if run.task not in FIGURES_OF:
        return False
    if data is not None or run.values.get("held_out"):
        return True
    if run.task == "nla":
        return False
    from nla_megatron.tasks.text import Data, open_task

    prompts = _prompts(run)
    if prompts.options.get("held_out"):
        return True
    # Without a file of either kind a task has rows of its own, a part of which may be held out.
    own = not run.values.get("data") and open_task(prompts, Data(training=False), str(run.values["model"]), run.seed)
    return own not in (None, False)


def evaluation_words(run: Run, models: Mapping[str, str], data: str | None) -> list[str]:
    """The overrides of an evaluation of these models, by key, as the run's task has it."""
    rows = data or run.values.get("held_out")
    words = [f"{key}={literal(directory)}" for key, directory in models.items()]
    words += [f"data={literal(str(rows))}"] if rows else []
    allowed = run.values.get("allow_unknown_config")
    words += [f"allow_unknown_config={literal(allowed)}"] if allowed else []
    task = _task(run)
    if task.name == "nla":
        return words
    if task.name != "sae":
        return [f"task={task.name}", *words, *(f"task.options.{key}={literal(v)}" for key, v in task.options.items())]
    # The exported predictor says itself what it steers.
    words += [f"model={literal(str(run.values['model']))}", f"task.options.prompts={literal(task.options['prompts'])}"]
    if task.options.get("objective", "rl") == "rl":  # else nothing was rewarded
        words += [f"reward.{key}={literal(value)}" for key, value in run.record["reward"].items()]
    return ["task=sae", *words]


def _task(run: Run) -> TaskConfig:
    """What is evaluated: of a run of `sae` without steering, the text task that its model learned."""
    name = run.task
    options: dict[str, Any] = run.record["task"]["options"] if "task" in run.record else {}
    return _prompts(run) if name == "sae" and not options.get("steering", True) else TaskConfig(name, options)


def _prompts(run: Run) -> TaskConfig:
    """The text task that the prompts are of."""
    given: dict[str, Any] = run.record["task"]
    if given["name"] == "sae":
        given = {"options": {}, **given["options"]["prompts"]}
    return TaskConfig(given["name"], given["options"])
