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
from nla_megatron.contract.files import write_json
from nla_megatron.contract.journal import read_object, read_rows
from nla_megatron.contract.splits import held_out
from nla_megatron.errors import ConfigError, RunError
from nla_megatron.launch import commands
from nla_megatron.launch.local import command_process, warm_up


@dataclass(frozen=True)
class Stage:
    """One command of the demo: `name` is its directory and its key in `stages`, `inputs` what ties it to the others."""

    name: str
    command: str
    inputs: tuple[str, ...]


def stages(out: Path) -> list[Stage]:
    """The demo's commands, in order."""
    base, table = out / "pretrain" / "hf", out / "build"
    av, ar = out / "sft_av" / "hf", out / "sft_ar" / "hf"
    rl, held_out_table = out / "rl", table / "held_out.parquet"
    held = f"data={held_out_table}"
    return [
        Stage("pretrain", "pretrain", (f"corpus={out / 'corpus.parquet'}", f"tokenizer={out / 'tokenizer'}")),
        Stage("extract", "extract", (f"model={base}", f"corpus={out / 'corpus.parquet'}")),
        Stage("explain", "explain", (f"input={out / 'extract' / 'base.parquet'}",)),
        Stage("build", "build", (f"input={out / 'explain' / 'explained.parquet'}", f"model={base}")),
        Stage("sft_av", "sft", ("role=av", f"model={base}", f"data={table / 'av_sft.parquet'}")),
        Stage("sft_ar", "sft", ("role=ar", f"model={base}", f"data={table / 'ar_sft.parquet'}")),
        Stage("eval_sft", "eval", (f"av={av}", f"ar={ar}", held)),
        Stage("rl", "rl", (f"av={av}", f"ar={ar}", f"data={table / 'rl.parquet'}", f"held_out={held_out_table}")),
        Stage("eval", "eval", (f"av={rl / 'av'}", f"ar={rl / 'ar'}", held, f"compare={out / 'eval_sft'}")),
    ]


def check(config: DemoConfig, world_size: int) -> None:
    """Every stage's overrides are composed before the first one runs; raises ConfigError."""
    check_run_directory("demo", config)
    known = {stage.name for stage in stages(Path(config.out))}
    if unknown := sorted(set(config.stages) - known):
        raise ConfigError(f"stages.{unknown[0]}", f"one of {', '.join(sorted(known))}", "correct the stage's name")
    for stage in stages(Path(config.out)):
        compose(stage.command, _overrides(config, stage))


def run(config: DemoConfig) -> None:
    out = Path(config.out)
    claim_run_directory("demo", config)
    started, seconds = time.monotonic(), _read_seconds(out)
    warm_up()
    for name, work in _work(config):
        if (out / name / "done").is_file() and name in seconds:
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
    for stage in stages(Path(config.out)):
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
    fraction = _held_out_fraction(config)
    seen = [text for doc_id, text in read_corpus(out / "corpus.parquet") if not held_out(doc_id, fraction)]
    train_tokenizer(seen, config.vocab_size, out / "tokenizer")
    (out / "corpus").mkdir(exist_ok=True)
    (out / "corpus" / "done").write_text("")


def _held_out_fraction(config: DemoConfig) -> float:
    build = next(stage for stage in stages(Path(config.out)) if stage.name == "build")
    return compose("build", _overrides(config, build)).held_out


def summary(config: DemoConfig, seconds: dict[str, float]) -> dict[str, Any]:
    """The headline figures, read from what the stages wrote."""
    out = Path(config.out)
    before, after = (read_object(out / name / "eval.json") for name in ("eval_sft", "eval"))
    steps = read_rows(out / "rl" / "metrics.jsonl", ("step",))
    rl_stage = next(stage for stage in stages(out) if stage.name == "rl")
    rl = compose("rl", _overrides(config, rl_stage))
    evaluated = (before["injected"] + after["injected"], before["expected_injections"] + after["expected_injections"])
    return {
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


def _read_seconds(out: Path) -> dict[str, float]:
    path = out / "seconds.json"
    return read_object(path) if path.is_file() else {}
