"""`compare`: every finished run under a folder, or every checkpoint that it kept, evaluated and put side by side.

    out/results.csv  out/results.json     every figure of every run
    out/report.html                       the page
    out/curves/*.svg  *.png               learning curves
    out/evaluations/RUN/HASH/             what `eval` wrote; HASH is of models, rows and overrides
    out/models/RUN/HASH/{av,ar,hf}/       kept checkpoints as Hugging Face directories, which `eval` reads

An evaluation whose inputs are what they were is not repeated.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from nla_megatron.config.compose import compose
from nla_megatron.config.multirun import literal
from nla_megatron.config.run_directory import is_done, is_free_directory, permanent_steps, run_record
from nla_megatron.config.schema import CompareConfig
from nla_megatron.config.typed import quoted
from nla_megatron.contract.files import write_json
from nla_megatron.contract.journal import read_object
from nla_megatron.contract.sidecar import model_sidecar_path, read_model_sidecar, write_model_sidecar
from nla_megatron.errors import ConfigError, MissingFile, RunDirectoryError, RunError
from nla_megatron.evaluation.comparison import FINAL, Comparison, Entry, chosen_metric, direction, write_tables
from nla_megatron.evaluation.comparison_charts import curves, write_charts
from nla_megatron.evaluation.comparison_page import PAGE, write_page
from nla_megatron.evaluation.evaluable import (
    TrainedModel,
    can_be_evaluated,
    evaluation_words,
    models_of,
    will_have,
)
from nla_megatron.evaluation.runs import FIGURES, Run, check_alike, find_runs, numbers
from nla_megatron.launch.jobs import FAILED, QUEUED, Job, Outcome, check_job, check_launcher, check_read, run_jobs
from nla_megatron.launch.sweep import LAUNCHER_FILES, LOGS, table

RECORD, EVALUATIONS, MODELS, CURVES = "compare.json", "evaluations", "models", "curves"
_FOR_EVAL, _OBJECTIVE = "eval.", "task.options.objective"


@dataclass(frozen=True)
class Place:
    """A run at one checkpoint: where its models are, as `eval` takes them or as checkpoints to export first."""

    config: CompareConfig
    run: Run
    checkpoint: str
    step: int
    source: Path
    models: Path

    @property
    def name(self) -> str:
        return self.run.name if self.checkpoint == FINAL else f"{self.run.name}@{self.checkpoint}"

    @property
    def exported(self) -> bool:
        return self.checkpoint == FINAL

    @property
    def parts(self) -> tuple[TrainedModel, ...]:
        """The models that are evaluated."""
        return models_of(self.run)

    @cached_property
    def words(self) -> list[str]:
        """The overrides of this place's evaluation, whose directory is named for everything that it reads."""
        if not can_be_evaluated(self.run, self.config.data):
            raise ConfigError(f"no held_out in the run {self.run.name}", "rows to evaluate on", "add data=")
        models = {one.key: str(self.models / one.exported) for one in self.parts}
        words = [*evaluation_words(self.run, models, self.config.data), *self.config.overrides]
        record = run_record("eval", compose("eval", [*words, "out=''"]))
        told = {key: value for key, value in record.items() if key not in (*models, "parallel", "logger")}
        read = [_identity(self.source / (one.exported if self.exported else one.module)) for one in self.parts]
        out = Path(self.config.out) / EVALUATIONS / _flat_name(self.run) / _hash([told, read])
        return [*words, f"out={quoted(str(out))}"]

    @cached_property
    def evaluation(self) -> Any:
        """The configuration of this place's evaluation."""
        return compose("eval", self.words)


def configured(arguments: Sequence[str]) -> CompareConfig:
    """`root=DIR out=DIR eval.rows=100`, where `eval.` begins what every evaluation is told. Raises ConfigError."""
    words = list(arguments)
    config: CompareConfig = compose("compare", [word for word in words if not word.startswith(_FOR_EVAL)])
    passed = [word.removeprefix(_FOR_EVAL) for word in words if word.startswith(_FOR_EVAL)]
    return replace(config, overrides=[*config.overrides, *passed])


def check(config: CompareConfig, world_size: int) -> None:
    """Raises a named error where there is nothing to compare, or nothing that can be compared."""
    _check_directory(config)
    runs, _ = find_runs(Path(config.root), config.command, Path(config.out))
    check_alike(runs)
    places = places_of(config, runs)
    if not _evaluates(config, runs):
        if config.data is not None:
            raise ConfigError(f"data={config.data} with nothing to evaluate", "runs that `eval` takes", "drop data=")
        chosen_metric([_entry(config, place, {}) for place in places], config.metric, config.last)
        return
    if config.data is None:
        check_alike(runs, dict.fromkeys(_rows_keys(runs), "held-out rows"))
    if config.metric is not None and not will_have(runs[0].task, config.metric, places[0].evaluation.names):
        chosen_metric([_entry(config, place, {}) for place in places], config.metric, config.last)
    fitted = [place for place in places if not place.exported and place.run.values.get(_OBJECTIVE) == "mse"]
    if fitted:
        raise ConfigError(
            f"checkpoints={config.checkpoints} with {fitted[0].run.name}, which sampled nothing",
            "checkpoints of runs with the objective rl", "use checkpoints=final, or evaluate=false",
        )  # fmt: skip
    check_read("eval", [(place.evaluation, config.overrides) for place in places])
    for place in places:
        if place.exported and not is_done(place.evaluation):
            check_job(f"evaluation of {place.name}", "eval", place.evaluation, place.evaluation.ranks)
    jobs = [_eval_job(config, place) for place in places]
    for place in places:
        if not place.exported and not is_done(place.evaluation):
            jobs += export_jobs(config, place)
    check_launcher(jobs, config.jobs, config.launcher)


def run(config: CompareConfig) -> None:
    """Evaluate what has not been, write tables, charts and page. Raises RunError where an evaluation failed."""
    out = Path(config.out)
    runs, unfinished = find_runs(Path(config.root), config.command, out)
    write_json(out / RECORD, {"root": str(Path(config.root).resolve())})
    places = places_of(config, runs)
    failed = _evaluate(config, places) if _evaluates(config, runs) else {}
    if failed is None:
        print("The evaluations are in the queue; the same command writes the page once they are done.", flush=True)
        return
    entries = [_entry(config, place, failed) for place in places]
    metric = chosen_metric(entries, config.metric, config.last)
    comparison = Comparison(
        Path(config.root), entries, metric, direction(metric, config.best), config.last, unfinished, failed
    )
    charts = curves(comparison, config.curves)
    write_tables(comparison, out)
    write_charts(charts, out / CURVES, config.png)
    write_page(comparison, charts, out / PAGE)
    for name in unfinished:
        print(f"not finished, left out: {name}", file=sys.stderr)
    print(f"Page: {(out / PAGE).resolve()}", flush=True)
    if failed:
        raise RunError(
            f"{len(failed)} of {len(places)} evaluations failed, the first is {next(iter(failed))}", "all of them done",
            f"read {out / LOGS}; the same command runs what is missing",
        )  # fmt: skip


def _check_directory(config: CompareConfig) -> None:
    out, record = Path(config.out), Path(config.out) / RECORD
    if record.is_file():
        found, expected = read_object(record, ("root",))["root"], str(Path(config.root).resolve())
        if found != expected:
            raise RunDirectoryError(f"{out} compares the runs under {found}", expected, "choose another out=")
    elif not is_free_directory(out):
        raise RunDirectoryError(
            f"{out} is not empty and no comparison's directory", "a new or empty directory", "choose another out="
        )


def _rows_keys(runs: Sequence[Run]) -> list[str]:
    """The keys that say which rows are held out."""
    starts = ("task.options.held_out", "task.options.prompts.options.held_out")
    of_tasks = (key for run in runs for key in run.values if key.startswith(starts))
    return list(dict.fromkeys(("held_out", *of_tasks)))


def _evaluates(config: CompareConfig, runs: Sequence[Run]) -> bool:
    """Whether these are runs that `eval` takes, and there are rows to evaluate on."""
    mine = config.evaluate and config.command == "rl"
    return mine and any(can_be_evaluated(run, config.data) for run in runs)


def places_of(config: CompareConfig, runs: Sequence[Run]) -> list[Place]:
    """Each run at each checkpoint that is compared. Raises MissingFile where there is none."""
    places = []
    for run in runs:
        kept = permanent_steps(run.directory) if config.checkpoints != "final" else {}
        for step, path in kept.items():
            if step == run.steps and config.checkpoints == "all":
                continue  # what the run exported at its end
            models = Path(config.out) / MODELS / _flat_name(run) / _hash(_identity(path))
            places.append(Place(config, run, f"step_{step:08d}", step, path, models))
        if config.checkpoints != "permanent":
            places.append(Place(config, run, FINAL, run.steps, run.directory, run.directory))
    if not places:
        raise MissingFile(
            f"no permanent checkpoint in any of {len(runs)} runs under {config.root}",
            "runs made with keep_every=", "use checkpoints=final",
        )  # fmt: skip
    return places


def _holds_models(run: Run) -> bool:
    """Whether a run's checkpoints are whole models of Hugging Face's, which `convert` exports one tensor at a time."""
    adapted = any(run.values.get(f"{key}.rank") for key in ("lora", "ar_lora"))
    steered = any(one.module == "predictor" for one in models_of(run))
    return not (adapted or steered or _projects(str(run.values.get("av") or "")))


def _projects(av: str) -> bool:
    injection = read_model_sidecar(av).injection if model_sidecar_path(av).is_file() else None
    return injection is not None and injection.projection is not None


def _flat_name(run: Run) -> str:
    return run.name.replace("/", "__")


def _identity(directory: Path) -> list[Any]:
    """What tells a model from another that was written to its place: its files' names, sizes and times."""
    found = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return [[str(path.relative_to(directory)), path.stat().st_size, path.stat().st_mtime_ns] for path in found]


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _eval_job(config: CompareConfig, place: Place) -> Job:
    log = Path(config.out) / LOGS / f"eval_{place.name.replace('/', '__')}.log"
    return Job(place.name, ("eval", *place.words), place.evaluation.ranks, log)


def export_jobs(config: CompareConfig, place: Place) -> list[Job]:
    """What makes directories for `eval` of a checkpoint."""
    if not _holds_models(place.run):
        # On the layout on which they fitted.
        layout = [f"parallel.{key}={literal(value)}" for key, value in place.run.record["parallel"].items()]
        words = ("export", f"checkpoint={quoted(str(place.source))}", f"out={quoted(str(place.models))}", *layout)
        log = Path(config.out) / LOGS / f"export_{place.name.replace('/', '__')}.log"
        return [Job(f"{place.name} models", words, compose("export", words[1:]).ranks, log)]
    jobs = []
    for one in place.parts:
        base = place.run.values[one.key]
        words = ("convert", "direction=export", f"checkpoint={quoted(str(place.source / one.module))}",
                 f"hf={quoted(base)}", f"out={quoted(str(place.models / one.exported))}")  # fmt: skip
        log = Path(config.out) / LOGS / f"export_{place.name.replace('/', '__')}_{one.key}.log"
        jobs.append(Job(f"{place.name} {one.key}", words, 1, log))
    return jobs


def _evaluate(config: CompareConfig, places: Sequence[Place]) -> dict[str, str] | None:
    """Export and evaluate what has not been.

    Returns:
        The names of the evaluations that failed, with what they said; None while some of them are in a queue.
    """
    todo = [place for place in places if not is_done(place.evaluation)]
    print(f"{len(places)} evaluations, {len(places) - len(todo)} done already", file=sys.stderr, flush=True)
    exports = _run(config, [job for place in todo if not place.exported for job in export_jobs(config, place)])
    lost = {outcome.name.rpartition(" ")[0]: outcome.told for outcome in exports if outcome.state == FAILED}
    if any(outcome.state == QUEUED for outcome in exports):
        return None
    ready = [place for place in todo if place.name not in lost]
    for place in ready:
        if not place.exported:
            _write_sidecars(place)
    outcomes = _run(config, [_eval_job(config, place) for place in ready])
    if outcomes:
        print(table(outcomes), flush=True)
    if any(outcome.state == QUEUED for outcome in outcomes):
        return None
    return lost | {outcome.name: outcome.told for outcome in outcomes if outcome.state == FAILED}


def _run(config: CompareConfig, jobs: Sequence[Job]) -> list[Outcome]:
    outcomes: list[Outcome] = []

    def report(outcome: Outcome) -> None:
        outcomes.append(outcome)
        print(f"{outcome.state:<7} {outcome.name}", file=sys.stderr, flush=True)

    if jobs:
        run_jobs(jobs, config.jobs, config.launcher, report, Path(config.out) / LAUNCHER_FILES)
    return outcomes


def _write_sidecars(place: Place) -> None:
    """An exported checkpoint is of the contract of the model that its run began with."""
    for one in (part for part in place.parts if part.sidecar):
        directory, base = place.models / one.exported, str(place.run.values[one.key])
        if model_sidecar_path(directory).is_file():
            continue
        parent = read_model_sidecar(base)
        training = {"steps": place.step, "checkpoint": str(place.source)}
        trained_on = (*parent.trained_on, str(place.run.values.get("inputs.data", place.run.values["data"])))
        write_model_sidecar(directory, replace(
            parent, stage="rl", parent_checkpoints=(base,), trained_on=trained_on, training=training, created_at="",
            git_commit="",
        ))  # fmt: skip


def _entry(config: CompareConfig, place: Place, failed: dict[str, str]) -> Entry:
    figures: dict[str, float] = {}
    if _evaluates(config, [place.run]) and place.name not in failed:
        figures = numbers(Path(place.evaluation.out) / FIGURES) if is_done(place.evaluation) else {}
    return Entry(place.run, place.checkpoint, place.step, figures)
