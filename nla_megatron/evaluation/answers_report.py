"""The page of an evaluation of responses: one HTML file that needs nothing beside itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from nla_megatron import __version__
from nla_megatron.contract.files import atomic_path
from nla_megatron.evaluation.report_style import STYLE

_ABOUT = {
    "accuracy": "Share of right answers",
    "accuracy_strict": "Share of right answers in the format that was asked for",
    "format_rate": "Share of responses in that format",
    "answer_found": "Share of responses with any answer",
    "truncated": "Share of responses that did not end",
    "thinking_tokens": "Tokens of thinking",
    "response_tokens": "Tokens of a response",
    "richness": "Share of different words",
    "words": "Words of a response",
    "reward": "Reward",
    "response_length": "Tokens of a response",
    "steered_tokens": "Tokens that were steered",
    "steering_failed": "Tokens that should have been steered and were not",
    "references_unreadable": "Problems left out: no readable reference",
}
_IN_TEXT = ("prompt", "response", "reference", "answer", "row", "finished")
_SPREAD = ("mean", "median", "p90")


def write_answers_report(
    out: Path, task: str, main: str, results: Mapping[str, Any], examples: Sequence[Mapping[str, Any]]
) -> None:
    """Write the page in one piece.

    Args:
        main: the figure on top, a key of `results`, with its interval under `{main}_ci95`.
        results: as in `eval.json`: numbers, and tables of numbers.
        examples: as in `examples.jsonl`.
    """
    write_page(out, task, [_head(task, main, results), _lengths(results), _tables(results), _examples(examples)])


def write_page(out: Path, task: str, parts: Sequence[str]) -> None:
    """The page of an evaluation from its parts, which are HTML, in one piece."""
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(task)}: evaluation</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + f"\n<footer>Written by nla_megatron {__version__} from eval.json and examples.jsonl.</footer>\n"
        "</main></body></html>\n"
    )
    with atomic_path(out) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")  # a model can write half a character


def number(value: Any) -> str:
    """A value as HTML."""
    if not isinstance(value, int | float):
        return escape(str(value))
    text = f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"
    return f'<data value="{value!r}">{text.replace("-", "−")}</data>'


def name_of(key: str) -> str:
    """A figure as a reader calls it."""
    return _ABOUT.get(key) or key[:1].upper() + key[1:].replace("_", " ")


def _head(task: str, main: str, results: Mapping[str, Any]) -> str:
    bounds = results.get(f"{main}_ci95")
    interval = f'<p class="muted">95 % interval {number(bounds[0])} to {number(bounds[1])}</p>' if bounds else ""
    spreads = tuple(f"_{part}" for part in _SPREAD)
    rows = "".join(
        f'<tr><th scope="row">{escape(name_of(key))}</th><td class="number">{number(value)}</td></tr>'
        for key, value in results.items()
        if key not in (main, "task") and isinstance(value, int | float) and not key.endswith(spreads)
    )
    return (
        f'<p class="kicker">Evaluation</p><h1>Task {escape(task)}</h1>'
        '<section class="head" aria-label="Headline figures">'
        f'<div><div class="hero">{number(results[main])}</div><p class="hero-label">{escape(name_of(main))}</p>'
        f"{interval}</div><table><tbody>{rows}</tbody></table></section>"
    )


def _lengths(results: Mapping[str, Any]) -> str:
    names = [key.removesuffix("_mean") for key in results if key.endswith("_mean")]
    names = [name for name in names if all(f"{name}_{part}" in results for part in _SPREAD)]
    rows = "".join(
        f'<tr><th scope="row">{escape(name_of(name))}</th>'
        + "".join(f'<td class="number">{number(results[f"{name}_{part}"])}</td>' for part in _SPREAD)
        + "</tr>"
        for name in names
    )
    head = "".join(f'<th scope="col" class="number">{part}</th>' for part in ("mean", "median", "90th percentile"))
    return (
        f"<h2>Lengths</h2><table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>" if rows else ""
    )


def _tables(results: Mapping[str, Any]) -> str:
    found = ""
    for key, table in results.items():
        if isinstance(table, Mapping):
            rows = "".join(
                f'<tr><th scope="row">{escape(str(name))}</th><td class="number">{number(value)}</td></tr>'
                for name, value in table.items()
            )
            found += f"<h2>{escape(name_of(key))}</h2><table><tbody>{rows}</tbody></table>"
    return found


def _examples(examples: Sequence[Mapping[str, Any]]) -> str:
    return f"<h2>Examples</h2>{''.join(_example(each) for each in examples)}" if examples else ""


def _example(example: Mapping[str, Any]) -> str:
    figures = ", ".join(
        f"{escape(key.replace('_', ' '))} <b>{number(value)}</b>"
        for key, value in example.items()
        if key not in _IN_TEXT and value != ""
    )
    compared = ""
    if "reference" in example:
        answer = example.get("answer")
        given = escape(str(answer)) if answer is not None else '<span class="bad">not in the format</span>'
        compared = (
            f'<div><h3>Answer</h3><p class="text">{given}</p><h3>Reference</h3>'
            f'<p class="text">{escape(str(example["reference"]))}</p></div>'
        )
    ending = "" if example.get("finished") else ' <span class="bad">[cut off]</span>'
    return (
        f"<article><header><span>row {example.get('row')}</span><span>{figures}</span></header>"
        f'<blockquote>{escape(str(example["prompt"]))}</blockquote><div class="two"><div><h3>Response</h3>'
        f'<p class="text">{escape(str(example["response"]))}{ending}</p></div>{compared}</div></article>'
    )
