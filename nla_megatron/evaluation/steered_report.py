"""The page of an evaluation of steering: one HTML file that needs nothing beside itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from nla_megatron.evaluation.answers_report import name_of, number, write_page

_COUNTS = ("rows", "samples", "temperature", "steered_tokens", "steering_failed")
_STATISTICS = ("mean", "std", "min", "max")


def write_steered_report(
    out: Path, main: str, results: Mapping[str, Any], examples: Sequence[Mapping[str, Any]]
) -> None:
    """Write the page in one piece.

    Args:
        main: the figure whose gain is on top, a key of `results` beside `{main}_plain` and `{main}_gain`.
        results: as in `eval.json`.
        examples: as in `examples.jsonl`.
    """
    parts = [_head(main, results), _sides(results), _strengths(results["strengths"]), _examples(main, examples)]
    write_page(out, "sae", parts)


def _head(main: str, results: Mapping[str, Any]) -> str:
    low, high = results[f"{main}_gain_ci95"]
    compared = f"{main}_over_compared"
    counts: dict[str, Any] = {name_of(key): results[key] for key in _COUNTS}
    if compared in results:
        low_over, high_over = results[f"{compared}_ci95"]
        counts[f"{name_of(main)} over the other evaluation's"] = results[compared]
        counts |= {"From (95 % interval)": low_over, "To": high_over}
    rows = "".join(_row(name, value) for name, value in counts.items())
    return (
        f'<p class="kicker">Evaluation</p><h1>Steered or not: task {escape(str(results["prompts"]))}</h1>'
        '<section class="head" aria-label="Headline figures">'
        f'<div><div class="hero">{number(results[f"{main}_gain"])}</div>'
        f'<p class="hero-label">{escape(name_of(main))}, steered less not steered</p>'
        f'<p class="muted">95 % interval {number(low)} to {number(high)}</p></div>'
        f"<table><tbody>{rows}</tbody></table></section>"
    )


def _sides(results: Mapping[str, Any]) -> str:
    """Every figure that both sides have; of those that are paired, the difference with its interval."""
    rows = ""
    for key in (key for key in results if f"{key}_plain" in results):
        on, off = results[key], results[f"{key}_plain"]
        bounds = results.get(f"{key}_gain_ci95")
        interval = f"{number(bounds[0])} to {number(bounds[1])}" if bounds else ""
        rows += _row(name_of(key), on, off, on - off, interval)
    heads = ("steered", "not steered", "difference", "95 % interval")
    return f"<h2>The same prompts and seeds</h2>{_table(heads, rows)}"


def _strengths(strengths: Mapping[str, Mapping[str, float]]) -> str:
    rows = "".join(_row(name, *(values[key] for key in _STATISTICS)) for name, values in strengths.items())
    return f"<h2>Strengths over the prompts</h2>{_table(_STATISTICS, rows)}"


def _table(heads: Sequence[str], rows: str) -> str:
    head = "".join(f'<th scope="col" class="number">{head}</th>' for head in heads)
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _row(name: str, *cells: Any) -> str:
    """A row of numbers; a text among them is HTML already."""
    shown = "".join(f'<td class="number">{cell if isinstance(cell, str) else number(cell)}</td>' for cell in cells)
    return f'<tr><th scope="row">{escape(name)}</th>{shown}</tr>'


def _examples(main: str, examples: Sequence[Mapping[str, Any]]) -> str:
    return f"<h2>Examples</h2>{''.join(_example(main, each) for each in examples)}" if examples else ""


def _example(main: str, example: Mapping[str, Any]) -> str:
    strengths = ", ".join(f"{escape(name)} <b>{number(value)}</b>" for name, value in example["strengths"].items())
    sides = "".join(
        f"<div><h3>{title}: {escape(name_of(main))} {number(example[f'{main}{end}'])}</h3>"
        f'<p class="text">{escape(str(example[f"response{end}"]))}</p></div>'
        for title, end in (("Steered", ""), ("Not steered", "_plain"))
    )
    return (
        f"<article><header><span>row {example['row']}</span><span>{strengths}</span></header>"
        f'<blockquote>{escape(str(example["prompt"]))}</blockquote><div class="two">{sides}</div></article>'
    )
