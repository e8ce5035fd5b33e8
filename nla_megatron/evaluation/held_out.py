"""`eval` of the task `nla`: how much the words carry on documents nobody trained on, with controls that make it mean
something.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nla_megatron.config.run_directory import check_run_directory, claim_run_directory, mark_done
from nla_megatron.config.schema import EvalConfig
from nla_megatron.contract import columns
from nla_megatron.contract.files import write_json, write_json_lines
from nla_megatron.contract.journal import read_object
from nla_megatron.conversion.description import check_directory
from nla_megatron.conversion.heads import reconstructor_shape, resolved_spec
from nla_megatron.conversion.hf import check_vocabulary, read_shape
from nla_megatron.conversion.live import load_reconstructor
from nla_megatron.conversion.projections import read_projections
from nla_megatron.errors import ConfigError, MissingFile
from nla_megatron.interventions.projection import projector
from nla_megatron.models.builder import check_layout, check_rollout_layout
from nla_megatron.models.pipeline import forward_rows
from nla_megatron.parallel.collectives import barrier
from nla_megatron.parallel.progress import progress
from nla_megatron.parallel.world import World, data_parallel_size
from nla_megatron.rollout.engine import Engine
from nla_megatron.tasks.nla import NlaTask, RowRunner, explanations_of
from nla_megatron.tasks.nla_held_out import Baseline, Measure, check_rows, held_out_rows
from nla_megatron.types import InjectionCount, ModelShape

RESULTS, ROWS, EXAMPLES = "eval.json", "rows.json", "examples.jsonl"


def check(config: EvalConfig, world_size: int) -> None:
    """Everything that can be known before the first sample; raises a named error."""
    data_parallel_size(config.parallel, world_size)
    missing = [key for key in ("av", "ar", "data") if not getattr(config, key)]
    if missing or config.samples != 1:
        raise ConfigError(
            f"no value for {', '.join(missing)}" if missing else f"samples={config.samples} in the task nla",
            "av, ar and data, and one sample of each row", f"add {' '.join(f'{key}=...' for key in missing)}"
            if missing else "leave samples out",
        )  # fmt: skip
    task = NlaTask.open(config.data, "rl", config.av)
    task.check_model(config.av, "av")
    task.check_model(config.ar, "ar")
    writer, reader = read_shape(config.av), _reader_shape(config.ar, task)
    check_layout(reader, config.parallel, "forward")
    if config.frozen_ar is not None:
        task.check_model(config.frozen_ar, "ar")
        frozen = _reader_shape(config.frozen_ar, task)
        check_layout(frozen, config.parallel, "forward")
        check_directory(config.frozen_ar, frozen, with_head=False)
        check_vocabulary(Path(config.av), frozen.vocab_size)
    check_rollout_layout(writer, config.rollout.tp, world_size, config.rollout.expert_parallel)
    check_directory(config.av, writer)
    check_directory(config.ar, reader, with_head=False)
    check_vocabulary(Path(config.av), reader.vocab_size)  # whose tokens the AR reads
    for name in (columns.EXPLANATION, columns.TEXT):
        task.table.column(name)
    if config.compare is not None and not (Path(config.compare) / ROWS).is_file():
        raise MissingFile(
            f"no {Path(config.compare) / ROWS}", "a finished evaluation's directory", "run that evaluation first"
        )
    check_rows(task, config.rows, config.seed, "rows")
    Baseline.of(task)
    check_run_directory("eval", config)


@dataclass(frozen=True)
class Condition:
    """One way of getting texts: what the AR made of each (N,) and the texts themselves."""

    mse_N: Tensor
    texts: tuple[str | None, ...]
    injections: InjectionCount | None = None


def run(config: EvalConfig, world: World) -> None:
    if world.is_main:
        claim_run_directory("eval", config)
    barrier(world)
    task = NlaTask.open(config.data, "rl", config.av)
    rows, baseline = held_out_rows(task, config.rows, config.seed), Baseline.of(task)
    if world.is_main and (note := baseline.note(task)) is not None:
        print(note, file=sys.stderr, flush=True)
    reader = _reader(config, config.ar, task, world)
    ends = task.tokenizer.end_ids
    shape, places = read_shape(config.av), task.interventions
    project = projector(read_projections(config.av, places, shape.hidden_size))
    engine = Engine(config.av, shape, config.rollout, places, world, ends, config.seed, task.marker, project)
    conditions: dict[str, Condition] = {}
    work: dict[str, Callable[[], Condition]] = {
        "av": lambda: _verbalised(task, engine, reader, rows, rows, config.seed),
        "shuffled": lambda: _verbalised(task, engine, reader, rows, deranged(rows, config.seed), config.seed),
        "gold": lambda: _read(task, reader, rows, [task.gold_explanations[row] for row in rows]),
    }
    if config.quote_words:
        contexts = task.table.column(columns.TEXT)
        quoted = [last_words(contexts[row], config.quote_words) for row in rows]
        work["quoted"] = lambda: _read(task, reader, rows, quoted)
    if config.frozen_ar is not None:
        frozen = _reader(config, config.frozen_ar, task, world)
        work["frozen_ar"] = lambda: _read(task, frozen, rows, conditions["av"].texts)
    with progress("eval", active=world.is_main, total=len(work), bar=config.logger.progress, unit="condition") as bar:
        for name, condition in work.items():
            conditions[name] = condition()
            bar.advance()
    if world.is_main:
        _write(config, task, baseline, rows, conditions)
        mark_done(config)
    engine.close()


def deranged(rows: Sequence[int], seed: int) -> list[int]:
    """The rows in an order in which no row keeps its place: every text is written for another row's activation."""
    order = np.random.default_rng([seed, 4]).permutation(len(rows))
    turned = [0] * len(rows)
    for place, following in zip(order, np.roll(order, -1), strict=True):
        turned[place] = rows[following]
    return turned


def last_words(text: str, count: int) -> str:
    """The end of a text from its `count`-th last word on, as it stands."""
    words = [match.start() for match in re.finditer(r"\S+", text)]
    return text[words[-count:][0] :].rstrip() if words else ""


def _reader_shape(ar: str, task: NlaTask) -> ModelShape:
    return reconstructor_shape(ar, resolved_spec(ar, None, task.sidecar.extraction.layer_index))


def _reader(config: EvalConfig, ar: str, task: NlaTask, world: World) -> RowRunner:
    model = load_reconstructor(ar, _reader_shape(ar, task), world, config.dtype)
    return lambda batch, collect: forward_rows(model, batch, world, config.micro_batch_size, collect)


def _verbalised(
    task: NlaTask, engine: Engine, reader: RowRunner, targets: list[int], sources: list[int], seed: int
) -> Condition:
    """Texts written for the activations of `sources`, scored against those of `targets`.

    A source brings all of its activations, in a prompt with a marker for each, however many the target has.
    """
    batch = engine.generate(task.requests(sources, seed, 0), task.inputs, 1)
    texts = explanations_of(batch.rollouts)
    mse_N, _ = task.score(reader, targets, texts)
    return Condition(mse_N, tuple(texts), batch.injections)


def _read(task: NlaTask, reader: RowRunner, rows: list[int], texts: Sequence[str | None]) -> Condition:
    """What the AR makes of texts that are there already."""
    mse_N, _ = task.score(reader, rows, texts)
    return Condition(mse_N, tuple(texts))


def _write(
    config: EvalConfig, task: NlaTask, baseline: Baseline, rows: list[int], conditions: dict[str, Condition]
) -> None:
    measure = Measure.of(task, baseline, rows, config.bootstrap, config.seed)
    results: dict[str, Any] = {
        "rows": len(rows),
        "documents": len(set(measure.documents)),
        "temperature": config.rollout.temperature,
        "fve_baseline": baseline.whose,
        "fve_baseline_rows": baseline.rows or len(rows),
        "fve_variance": measure.variance,
        "fve_mean_predictor": 0.0,
    }
    for name, condition in conditions.items():
        found = measure.fve(condition.mse_N)
        results |= {f"fve_{name}": found.value, f"fve_{name}_ci95": found.interval}
        results[f"fve_in_sample_{name}"] = measure.fve_in_sample(condition.mse_N)
        results[f"extraction_failed_{name}"] = sum(text is None for text in condition.texts) / len(rows)
        if config.names:
            results[f"named_{name}"] = {
                figure: {"found": named(condition.texts, words), "of": len(rows)}
                for figure, words in config.names.items()
            }
    counts = [condition.injections for condition in conditions.values() if condition.injections is not None]
    results |= {"injected": sum(c.injected for c in counts), "expected_injections": sum(c.expected for c in counts)}
    if config.compare is not None:
        results |= _difference(config, rows, conditions["av"].mse_N, measure)
    write_json(Path(config.out) / RESULTS, results)
    mses = {f"mse_{name}": condition.mse_N.tolist() for name, condition in conditions.items()}
    write_json(Path(config.out) / ROWS, {"rows": rows, "doc_ids": list(measure.documents), **mses})
    write_json_lines(Path(config.out) / EXAMPLES, _examples(config, task, rows, conditions))


def named(texts: Sequence[str | None], words: Sequence[str]) -> int:
    """How many of the texts have one of the words: whole, in any case; a text that is not there has none.

    A word of several has any space between them. Where a script writes no space between words, none is found.
    """
    parts = [r"\s+".join(map(re.escape, _folded(word).split())) for word in words]
    # Not \b, which sees no word's end behind a sign such as the one of "C++".
    anyone = re.compile(rf"(?<!\w)(?:{'|'.join(parts)})(?!\w)")
    return sum(text is not None and anyone.search(_folded(text)) is not None for text in texts)


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()


def _difference(config: EvalConfig, rows: list[int], mse_N: Tensor, measure: Measure) -> dict[str, Any]:
    """This evaluation's FVE over another's of the same rows, resampled together."""
    other = read_object(Path(str(config.compare)) / ROWS, ("rows", "doc_ids", "mse_av"))
    if (other["rows"], other["doc_ids"]) != (rows, list(measure.documents)):
        raise ConfigError(
            f"other rows in {config.compare}", "an evaluation of the same rows", "use the same data=, rows= and seed="
        )
    found = measure.gain(mse_N, torch.tensor(other["mse_av"]))
    return {"fve_gain": found.value, "fve_gain_ci95": found.interval}


def _examples(
    config: EvalConfig, task: NlaTask, rows: list[int], conditions: dict[str, Condition]
) -> list[dict[str, Any]]:
    contexts = task.table.column(columns.TEXT)
    # Under the contract's scale the error is 2 (1 - cosine).
    cosine = {name: (1 - condition.mse_N / 2).tolist() for name, condition in conditions.items()}
    return [
        {
            **task.place(row),
            "context": contexts[row],
            "explanation": conditions["av"].texts[index],
            "gold": conditions["gold"].texts[index],
            "failed": conditions["av"].texts[index] is None,
            "cosine": cosine["av"][index],
            "cosine_shuffled": cosine["shuffled"][index],
            "cosine_gold": cosine["gold"][index],
        }
        for index, row in enumerate(rows[: config.examples])
    ]
