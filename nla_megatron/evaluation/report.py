"""The report of a run: one HTML file that needs nothing beside itself, made from the files the run wrote."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from nla_megatron import __version__
from nla_megatron.evaluation import told
from nla_megatron.evaluation.charts import format_value
from nla_megatron.evaluation.denominator import denominator
from nla_megatron.evaluation.report_charts import rl_charts, sft_charts
from nla_megatron.evaluation.report_files import Row, RunFiles, read_run
from nla_megatron.evaluation.report_style import STYLE

EXAMPLES = 20
CONTEXT_WORDS, CONTEXT_CHARACTERS = 70, 600  # enough to follow the passage; the activation was read at its end
LAST_WORDS, LAST_CHARACTERS = 6, 60
SHOWN_KEYS = (
    *("run_name", "steps", "world", "seconds", "logprob_gap_max", "injected", "expected_injections"),
    *("fve_sft", "fve_rl", "fve_rl_ci95", "fve_gold_text", "fve_shuffled", "fve_gain", "fve_gain_ci95"),
    *("fve_frozen_ar", "fve_frozen_ar_ci95", "fve_text_only"),
    *("fve_rl_in_sample", "fve_baseline", "fve_baseline_rows"),
)
STAGES = {"sft_av": "AV, supervised", "sft_ar": "AR, supervised", "rl": "RL", "pretrain": "Pre-training"}
SIZES = {
    "tp": "Tensor parallel",
    "pp": "Pipeline parallel",
    "dp": "Data parallel",
    "rollout_tp": "Rollout tensor parallel",
}


def write_report(run_dir: Path, out: Path) -> None:
    """Write the report of a run as one self-contained HTML file.

    Args:
        run_dir: holds `summary.json` and, as far as the run got, `rl/`, `sft_av/`, `sft_ar/` and `pretrain/` with
            `metrics.jsonl`, and `eval/examples.jsonl`. A file that is not there leaves its section out.
            `truncated` and `extraction_failed` are shares of the step's rollouts.
        out: the file to write, in one piece: a reader never sees half a page.

    Raises:
        MissingFile: there is no `summary.json`.
        RunDirectoryError: a file that is not what its name says.
    """
    run = read_run(run_dir)
    sections = (
        _head(run),
        _facts(run.summary),
        rl_charts(run),
        sft_charts(run),
        _time(run.summary),
        _examples(run.examples),
    )
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(run.name)}: Natural Language Autoencoder</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(section for section in sections if section)
        + f"\n<footer>Written by nla_megatron {__version__} from the files of the run.</footer>\n"
        + "</main></body></html>\n"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text(page, encoding="utf-8", errors="replace")  # a model can write half a character
    os.replace(temporary, out)


def _number(value: float | None, decimals: int = 3, signed: bool = False) -> str:
    """The value rounded for a reader, with the exact one in the markup."""
    if value is None:
        return '<span class="muted">not measured</span>'
    text = f"{value:{'+' if signed else ''},.{decimals}f}".replace("-", "−")
    return f'<data value="{value!r}">{text}</data>'


def _interval(bounds: Sequence[float], signed: bool = False) -> str:
    return f"95 % interval {_number(bounds[0], signed=signed)} to {_number(bounds[1], signed=signed)}"


def _head(run: RunFiles) -> str:
    summary = run.summary
    trained = summary.get("fve_rl") is not None
    value, stage = (summary["fve_rl"], "RL") if trained else (summary.get("fve_sft"), "SFT")
    bounds = summary.get("fve_rl_ci95") if trained else None
    in_sample = summary.get("fve_rl_in_sample") if trained else None
    compared = denominator(summary.get("fve_baseline"), summary.get("fve_baseline_rows"))
    return (
        f'<p class="kicker">Natural Language Autoencoder</p><h1>{escape(run.name)}</h1>'
        "<p>The AV, a language model, writes down what it finds in an activation; the AR rebuilds the activation from "
        "that text alone. FVE is the fraction of the activations’ variance that survives this round trip, measured on "
        f"documents that neither has seen: 1 − the AR’s error / the error of always predicting {escape(compared)}.</p>"
        f'<section class="head" aria-label="Headline figures"><div><div class="hero">{_number(value)}</div>'
        f'<p class="hero-label">held-out FVE after {stage}</p>'
        + (f'<p class="muted">{_interval(bounds)}</p>' if bounds else "")
        + (
            f'<p class="muted">{_number(in_sample)} against the mean of the evaluated rows (in-sample)</p>'
            if in_sample is not None
            else ""
        )
        + f"{_gain(summary)}</div>{_fve_table(summary)}</section>"
    )


def _gain(summary: Row) -> str:
    before, after, bounds = summary.get("fve_sft"), summary.get("fve_rl"), summary.get("fve_gain_ci95")
    if before is None or after is None:
        return ""
    text = f"{_number(after - before, signed=True)} over SFT"
    if bounds:
        text += f"<br>{_interval(bounds, signed=True)}"
        text += "; it includes zero: this run shows no difference" if bounds[0] <= 0 <= bounds[1] else ""
    return f'<p class="muted">{text}</p>'


def _fve_table(summary: Row) -> str:
    rows: tuple[tuple[str, float | None, Any], ...] = (
        ("AV after RL", summary.get("fve_rl"), summary.get("fve_rl_ci95")),
        ("AV after SFT", summary.get("fve_sft"), None),
        ("Gold text", summary.get("fve_gold_text"), None),
        ("AV, vectors shuffled", summary.get("fve_shuffled"), None),
        ("Mean predictor", 0.0, None),
    )
    others = (
        ("AV after RL, read by the AR of SFT", summary.get("fve_frozen_ar"), summary.get("fve_frozen_ar_ci95")),
        ("The context’s last words, quoted", summary.get("fve_text_only"), None),
    )
    rows = (*rows[:3], *(row for row in others if row[1] is not None), *rows[3:])
    low = max(-1.0, math.floor(10 * min(value for _, value, _ in rows if value is not None)) / 10)
    body = ""
    for name, value, bounds in rows:
        shown = "0 by definition" if name == "Mean predictor" else _number(value)
        weight = ' class="main"' if name == "AV after RL" else ""
        body += f'<tr{weight}><th scope="row">{name}</th>'
        body += f'<td class="number">{shown}</td><td class="plot">{_fve_mark(value, bounds, low)}</td></tr>'
    return (
        '<table><thead><tr><th scope="col">The AR reads</th><th scope="col" class="number">FVE</th>'
        f'<th scope="col" class="plot">from {format_value(low)} to 1</th></tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )


def _fve_mark(value: float | None, bounds: Sequence[float] | None, low: float) -> str:
    """A dot on a scale from `low` to 1, with its interval; a value below the scale sits at its edge."""
    if value is None:
        return ""
    at, zero, *ends = (100 * (min(1.0, max(low, v)) - low) / (1 - low) for v in (value, 0.0, *(bounds or ())))
    interval = f'<i class="whisker" style="left:{ends[0]:.1f}%;width:{ends[1] - ends[0]:.1f}%"></i>' if ends else ""
    return (
        f'<div class="mark"><i class="scale"></i><i class="zero" style="left:{zero:.1f}%"></i>{interval}'
        f'<i class="dot" style="left:{at:.1f}%"></i></div>'
    )


def _facts(summary: Row) -> str:
    facts: dict[str, str] = {}
    if summary.get("steps") is not None:
        facts["RL steps"] = _number(summary["steps"], 0)
    injected, expected = summary.get("injected"), summary.get("expected_injections")
    if injected is not None and expected is not None:
        state = "good" if injected == expected else "bad"
        facts["Activations injected"] = f'<span class="{state}">{_number(injected, 0)} of {_number(expected, 0)}</span>'
    if (gap := summary.get("logprob_gap_max")) is not None:
        facts["Largest log-prob gap"] = f'<data value="{gap!r}">{format_value(gap)}</data> nats per token'
    others = told.facts({key: value for key, value in summary.items() if key not in SHOWN_KEYS})
    facts |= {name: escape(value) for name, value in others.items()}
    entries = "".join(f"<div><dt>{escape(name)}</dt><dd>{text}</dd></div>" for name, text in facts.items())
    return f'<dl class="facts">{entries}</dl>' if entries else ""


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = round(seconds / 60), int(seconds // 3600)
    return f"{hours} h {round((seconds - 3600 * hours) / 60):02d} min" if minutes >= 60 else f"{minutes} min"


def _time(summary: Row) -> str:
    world = summary.get("world") or {}
    seconds = {stage: value for stage, value in (summary.get("seconds") or {}).items() if stage != "total"}
    total = sum(seconds.values())
    stages = "".join(
        f'<tr><th scope="row">{escape(STAGES.get(stage) or told.words(stage))}</th>'
        f'<td class="number"><data value="{spent!r}">{_duration(spent)}</data></td>'
        f'<td class="plot"><div class="share" style="width:{100 * spent / (total or 1):.1f}%"></div></td></tr>'
        for stage, spent in seconds.items()
    )
    sizes = "".join(
        f'<tr><th scope="row">{escape(SIZES.get(key) or told.words(key))}</th>'
        f'<td class="number">{_number(size, 0)}</td></tr>'
        for key, size in world.items()
    )
    tables = f"<table><tbody>{stages}</tbody></table>" if stages else ""
    tables += f"<table><tbody>{sizes}</tbody></table>" if sizes else ""
    note = f'<p class="caption">{_duration(total)} in all.</p>' if stages else ""
    return f'<h2>Time and machine</h2>{note}<div class="two">{tables}</div>' if tables else ""


def _examples(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    shown = rows[:EXAMPLES]
    note = f"The first {len(shown)} of {len(rows)} held-out activations, in file order. " if len(rows) > 1 else ""
    note += "The activation was read at the end of the marked words; the cosine is between it and the reconstruction."
    return f'<h2>Examples</h2><p class="caption">{note}</p>{"".join(_example(row) for row in shown)}'


def _example(row: Row) -> str:
    start, body, last = _split_context(str(row.get("context") or ""))
    scores = f"cosine <b>{_number(row.get('cosine'), 2)}</b>"
    if row.get("cosine_shuffled") is not None:
        scores += f", with another activation {_number(row['cosine_shuffled'], 2)}"
    written = escape(str(row.get("explanation") or ""))
    if row.get("failed"):
        written = f'<span class="bad">No explanation could be extracted.</span>\n{written}'
    gold = f'<div><h3>Gold</h3><p class="text">{escape(str(row["gold"]))}</p></div>' if row.get("gold") else ""
    return (
        f"<article><header><span>{escape(str(row.get('doc_id', '')))}</span><span>{scores}</span></header>"
        f"<blockquote>{start}{escape(body)}<mark>{escape(last)}</mark></blockquote>"
        f'<div class="two"><div><h3>The AV writes</h3><p class="text">{written}</p></div>{gold}</div></article>'
    )


def _split_context(text: str) -> tuple[str, str, str]:
    """("… " if the beginning is left out, the passage, its last words)."""
    text = text.rstrip()
    words = [match.start() for match in re.finditer(r"\S+", text)]
    if not words:
        return "", "", ""
    start = max(words[-CONTEXT_WORDS:][0], len(text) - CONTEXT_CHARACTERS)
    last = max(words[-LAST_WORDS:][0], len(text) - LAST_CHARACTERS)
    return "… " if start > words[0] else "", text[start:last], text[last:]
