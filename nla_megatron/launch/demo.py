"""`demo`: every stage in turn, each the command that a user would type, then one page that shows what was learned."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nla_megatron.config.compose import compose
from nla_megatron.config.run_directory import check_run_directory, claim_run_directory, mark_done
from nla_megatron.config.schema import DemoConfig
from nla_megatron.config.unread import Unread
from nla_megatron.contract.files import write_json
from nla_megatron.contract.journal import read_object, read_rows
from nla_megatron.contract.splits import held_out
from nla_megatron.errors import ConfigError, MissingFile, RunError
from nla_megatron.launch import commands, forecast
from nla_megatron.launch.local import command_process, warm_up
from nla_megatron.pretrained import cache
from nla_megatron.pretrained.catalogue import MODELS
from nla_megatron.types import ModelShape


@dataclass(frozen=True)
class Stage:
    """One command of the demo: `name` is its directory and its key in `stages`, `inputs` what ties it to the others."""

    name: str
    command: str
    inputs: tuple[str, ...]


def stages(config: DemoConfig) -> list[Stage]:
    """The demo's commands, in order; without `pretrain` where there is a model."""
    out, base = Path(config.out), base_model(config)
    table = out / "build"
    av, ar = out / "sft_av" / "hf", out / "sft_ar" / "hf"
    rl, held_out_table = out / "rl", table / "held_out.parquet"
    held = f"data={held_out_table}"
    pretrain = Stage("pretrain", "pretrain", (f"corpus={out / 'corpus.parquet'}", f"tokenizer={out / 'tokenizer'}"))
    return [
        *([pretrain] if config.model is None else []),
        Stage("extract", "extract", (f"model={base}", f"corpus={out / 'corpus.parquet'}")),
        Stage("explain", "explain", (f"input={out / 'extract' / 'base.parquet'}",)),
        Stage("build", "build", (f"input={out / 'explain' / 'explained.parquet'}", f"model={base}")),
        Stage("sft_av", "sft", ("role=av", f"model={base}", f"data={table / 'av_sft.parquet'}")),
        Stage("sft_ar", "sft", ("role=ar", f"model={base}", f"data={table / 'ar_sft.parquet'}")),
        Stage("eval_sft", "eval", (f"av={av}", f"ar={ar}", held)),
        Stage("rl", "rl", (f"av={av}", f"ar={ar}", f"data={table / 'rl.parquet'}", f"held_out={held_out_table}")),
        Stage(
            "eval", "eval",
            (f"av={rl / 'av'}", f"ar={rl / 'ar'}", f"frozen_ar={ar}", held, f"compare={out / 'eval_sft'}"),
        ),
    ]  # fmt: skip


def base_model(config: DemoConfig) -> Path:
    """Where the model is, or will be."""
    if config.model is None:
        return Path(config.out) / "pretrain" / "hf"
    if config.model in MODELS:
        return cache.cache_directory() / MODELS[config.model].directory
    return Path(config.model)


def check(config: DemoConfig, world_size: int) -> None:
    """Every stage's overrides are composed before the first one runs; raises ConfigError."""
    check_run_directory("demo", config)
    if config.model is not None and config.model not in MODELS and not Path(config.model).is_dir():
        raise MissingFile(
            f"model={config.model}, which is no directory", f"a model's directory, or one of {', '.join(MODELS)}",
            "correct model=",
        )  # fmt: skip
    # A scale's overrides of `pretrain` are idle where there is a model.
    known = {"pretrain", *(stage.name for stage in stages(config))}
    if unknown := sorted(set(config.stages) - known):
        raise ConfigError(f"stages.{unknown[0]}", f"one of {', '.join(sorted(known))}", "correct the stage's name")
    for stage in stages(config):
        compose(stage.command, _overrides(config, stage))


def _tell_how_long(config: DemoConfig, seconds: dict[str, float]) -> None:
    left = [stage for stage in stages(config) if not _is_done(config, stage.name, seconds)]
    if left:
        extract = next(stage for stage in stages(config) if stage.name == "extract")
        layer = compose("extract", _overrides(config, extract)).layer
        sizes = forecast.Sizes.of(_shape(config), layer, config.corpus_limit)
        told = forecast.told([(stage.name, stage.command, _overrides(config, stage)) for stage in left], sizes)
        print(told, file=sys.stderr, flush=True)


def _is_done(config: DemoConfig, name: str, seconds: dict[str, float]) -> bool:
    return (Path(config.out) / name / "done").is_file() and name in seconds


def _shape(config: DemoConfig) -> ModelShape:
    """Of the model, or of the one that will be trained."""
    from nla_megatron.conversion.hf import read_shape

    if config.model is not None:
        return read_shape(base_model(config))
    shape: ModelShape = compose("pretrain", _overrides(config, stages(config)[0])).architecture.shape(config.vocab_size)
    return shape


def unread(config: DemoConfig) -> Iterator[Unread]:
    """What is not read where nothing is trained from nothing."""
    if config.model is not None:
        yield "vocab_size", "with model="


def run(config: DemoConfig) -> None:
    out = Path(config.out)
    claim_run_directory("demo", config)
    started, seconds = time.monotonic(), _read_seconds(out)
    if config.model in MODELS:
        cache.model_directory(MODELS[config.model])  # also on a resume: a cache may have been emptied
    _tell_how_long(config, seconds)
    warm_up()
    for name, work in _work(config):
        if _is_done(config, name, seconds):
            continue
        print(f"── {name}", file=sys.stderr, flush=True)
        begun = time.monotonic()
        work()
        seconds[name] = seconds.get(name, 0.0) + time.monotonic() - begun
        write_json(out / "seconds.json", seconds)
    from nla_megatron.evaluation.report import write_report

    write_json(out / "summary.json", summary(config, seconds))
    write_report(out, out / "report.html")
    mark_done(config)
    print(f"{time.monotonic() - started:.0f} s.", flush=True)
    finished(config)


def finished(config: DemoConfig) -> None:
    """The last line of the demo, also when there was nothing left to do."""
    print(f"Report: {(Path(config.out) / 'report.html').resolve()}", flush=True)


def _work(config: DemoConfig) -> Iterator[tuple[str, Any]]:
    yield "corpus", lambda: _make_corpus(config)
    for stage in stages(config):
        yield stage.name, lambda stage=stage: _run_stage(config, stage)


def _overrides(config: DemoConfig, stage: Stage) -> list[str]:
    return [
        *stage.inputs,
        f"out={Path(config.out) / stage.name}",
        f"seed={config.seed}",
        # The base model must not have read what the AV and the AR are tested on.
        *([f"held_out={_held_out_fraction(config)}"] if stage.command == "pretrain" else []),
        *config.stages.get(stage.name, []),
    ]


def _run_stage(config: DemoConfig, stage: Stage) -> None:
    """Stages on ranks get processes of their own; the others run here and save a start."""
    overrides = _overrides(config, stage)
    if not commands.COMMANDS[stage.command].on_ranks:
        commands.execute(stage.command, overrides)
        return
    process = command_process(commands.run, [stage.command, *overrides])
    process.start()
    process.join()
    if code := process.exitcode:
        raise RunError(
            f"`nla-megatron {' '.join([stage.command, *overrides])}` ended with exit code {code}", "exit code 0",
            "see its message above; repeating the demo's command resumes it",
        )  # fmt: skip


def _make_corpus(config: DemoConfig) -> None:
    from nla_megatron.contract.corpus import read_corpus
    from nla_megatron.datagen.python_docs import write_corpus
    from nla_megatron.datagen.tokenizer import train_tokenizer

    out = Path(config.out)
    write_corpus(out / "corpus.parquet", config.corpus_limit)
    if config.model is None:
        fraction = _held_out_fraction(config)
        seen = [text for doc_id, text in read_corpus(out / "corpus.parquet") if not held_out(doc_id, fraction)]
        train_tokenizer(seen, config.vocab_size, out / "tokenizer")
    (out / "corpus").mkdir(exist_ok=True)
    (out / "corpus" / "done").write_text("")


def _held_out_fraction(config: DemoConfig) -> float:
    build = next(stage for stage in stages(config) if stage.name == "build")
    return compose("build", _overrides(config, build)).held_out


def summary(config: DemoConfig, seconds: dict[str, float]) -> dict[str, Any]:
    """The headline figures, read from what the stages wrote."""
    out = Path(config.out)
    before, after = (read_object(out / name / "eval.json") for name in ("eval_sft", "eval"))
    steps = read_rows(out / "rl" / "metrics.jsonl", ("step",))
    rl_stage = next(stage for stage in stages(config) if stage.name == "rl")
    rl = compose("rl", _overrides(config, rl_stage))
    evaluated = (before["injected"] + after["injected"], before["expected_injections"] + after["expected_injections"])
    return {
        **(
            {}
            if config.model is None
            else {"model": MODELS[config.model].title if config.model in MODELS else config.model}
        ),
        "fve_sft": before["fve_av"],
        "fve_rl": after["fve_av"],
        "fve_rl_ci95": after["fve_av_ci95"],
        "fve_rl_in_sample": after["fve_in_sample_av"],
        "fve_baseline": after["fve_baseline"],
        "fve_baseline_rows": after["fve_baseline_rows"],
        "fve_gain": after["fve_gain"],
        "fve_gain_ci95": after["fve_gain_ci95"],
        "fve_gold_text": after["fve_gold"],
        "fve_gold_text_sft": before["fve_gold"],
        "fve_shuffled": after["fve_shuffled"],
        **_controls(before, after),
        "steps": len(steps),
        "world": {"tp": rl.parallel.tp, "pp": rl.parallel.pp, "dp": rl.parallel.dp or 1, "rollout_tp": rl.rollout.tp},
        "seconds": {
            **{name: round(value, 1) for name, value in seconds.items()},
            "total": round(sum(seconds.values()), 1),
        },
        "logprob_gap_max": max(step["logprob_gap_max"] for step in steps),
        "injected": sum(step["injected"] for step in steps) + evaluated[0],
        "expected_injections": sum(step["expected_injections"] for step in steps) + evaluated[1],
        "held_out_rows": after["rows"],
        "held_out_documents": after["documents"],
    }


def _controls(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What not every evaluation has: the texts read by the AR that RL began with, and the context's own words."""
    names = {
        "fve_frozen_ar": "fve_frozen_ar",
        "fve_frozen_ar_ci95": "fve_frozen_ar_ci95",
        "fve_text_only": "fve_quoted",
    }
    found = {name: after[key] for name, key in names.items() if key in after}
    return found | ({"fve_text_only_sft": before["fve_quoted"]} if "fve_quoted" in before else {})


def _read_seconds(out: Path) -> dict[str, float]:
    path = out / "seconds.json"
    return read_object(path) if path.is_file() else {}
