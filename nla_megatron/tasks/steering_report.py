"""Steered or not, on the same prompts: numbers, and one page that a browser opens without anything else.

Legend: N responses to held-out prompts, P prompts, S strengths.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nla_megatron.contract.files import atomic_path, write_json

if TYPE_CHECKING:
    from torch import Tensor

_EXAMPLES = 20
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{padding:.3rem .8rem;border-bottom:1px solid #ccc;"
    "text-align:left;vertical-align:top}td.n{text-align:right;font-variant-numeric:tabular-nums}"
    "caption{text-align:left;font-weight:600}"
)


@dataclass(frozen=True)
class Side:
    """One of the two: rewards (N,) by response, responses, their tokens, and the task's own figures.

    `values` (N,): the figure that stands for the task, by response. No rewards where nobody asks for any, or where they
    are made of something that is known of training rows alone.
    """

    rewards: tuple[float, ...] | None
    texts: tuple[str, ...]
    tokens: tuple[int, ...]
    figures: Mapping[str, float]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """Both sides of an evaluation after `step` steps; response i of the one and of the other are of the same prompt.

    `applied` and `failed`: tokens of the steered responses whose stream was changed, and such that should have been.
    `strengths`: by name, the statistics of `strength_statistics`. `rows`, `samples`, `prompts` (N,): of each response
    its row, its number among those to this row, and the text of its prompt. `figure`: the name of the sides' `values`.
    """

    step: int
    rows: tuple[int, ...]
    samples: tuple[int, ...]
    prompts: tuple[str, ...]
    figure: str
    steered: Side
    plain: Side
    strengths: Mapping[str, Mapping[str, float]]
    applied: int
    failed: int
    places: tuple[Mapping[str, Any], ...] = ()
    """Of each response, where its row can be found again; none where nobody knows."""

    def numbers(self) -> dict[str, float]:
        """What is logged. `eval_reward_gain` is the mean paired difference, `*_error` its standard error."""
        shared = {name: value for name, value in self.steered.figures.items() if name in self.plain.figures}
        return {
            **self._reward_numbers(),
            "eval_response_length": _mean(self.steered.tokens),
            "eval_response_length_plain": _mean(self.plain.tokens),
            "eval_steered_tokens": float(self.applied),
            "eval_steering_failed": float(self.failed),
            **{f"eval_{name}": value for name, value in shared.items()},
            **{f"eval_{name}_plain": self.plain.figures[name] for name in shared},
        }

    def _reward_numbers(self) -> dict[str, float]:
        steered, plain = self.steered.rewards, self.plain.rewards
        if steered is None or plain is None:
            return {}
        gains = [one - other for one, other in zip(steered, plain, strict=True)]
        return {
            "eval_reward": _mean(steered),
            "eval_reward_plain": _mean(plain),
            "eval_reward_gain": _mean(gains),
            "eval_reward_gain_error": _error(gains),
        }


def strength_statistics(values_PS: Tensor, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Mean, standard deviation (of these prompts, not of a population), least and most of each strength, by name."""
    columns = values_PS.double().unbind(1)
    return {
        name: {
            "mean": float(column.mean()),
            "std": float(column.std(correction=0)),
            "min": float(column.min()),
            "max": float(column.max()),
        }
        for name, column in zip(names, columns, strict=True)
    }


def write_comparison(folder: Path, comparison: Comparison) -> None:
    """`step_N.json` with everything, `step_N.html` to read, and `latest.html`."""
    stem = f"step_{comparison.step:08d}"
    values: dict[str, Any] = {"numbers": comparison.numbers(), **asdict(comparison)}
    write_json(folder / f"{stem}.json", values)
    page = comparison_page(comparison)
    for name in (f"{stem}.html", "latest.html"):
        with atomic_path(folder / name) as path:
            path.write_text(page, encoding="utf-8", errors="replace")  # a model can write half a character


def comparison_page(comparison: Comparison) -> str:
    """The page: the two sides number by number, strengths, and pairs of responses."""
    numbers = comparison.numbers()
    paired = [name for name in numbers if f"{name}_plain" in numbers]
    both = [(name.removeprefix("eval_"), numbers[name], numbers[f"{name}_plain"]) for name in paired]
    gain = "Held-out responses have no reward here. "
    if "eval_reward_gain" in numbers:
        gain = (
            f"Steering changes the mean reward of {len(comparison.prompts)} responses by "
            f"{numbers['eval_reward_gain']:+.4g} (standard error {numbers['eval_reward_gain_error']:.2g}). "
        )
    strengths: list[tuple[str | float, ...]] = [
        (name, *(values[key] for key in ("mean", "std", "min", "max"))) for name, values in comparison.strengths.items()
    ]
    examples = [
        (prompt, steered, plain)
        for prompt, steered, plain in list(
            zip(comparison.prompts, comparison.steered.texts, comparison.plain.texts, strict=True)
        )[:_EXAMPLES]
    ]
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Steered or not</title><style>{_STYLE}</style>"
        f"<h1>Steered or not, after {comparison.step} steps</h1>"
        f"<p>{gain}{comparison.applied} tokens were steered, {comparison.failed} that should have been were not.</p>"
        + _table("The same prompts and seeds", ("", "steered", "not steered"), both)
        + _table("Strengths", ("", "mean", "std", "min", "max"), strengths)
        + _table("Responses", ("prompt", "steered", "not steered"), examples)
        + "</html>\n"
    )


def _table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str | float]]) -> str:
    head = "".join(f"<th>{html.escape(each)}</th>" for each in heads)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table><caption>{html.escape(caption)}</caption><tr>{head}</tr>{body}</table>"


def _cell(value: str | float) -> str:
    return f"<td>{html.escape(value)}</td>" if isinstance(value, str) else f"<td class=n>{value:.4g}</td>"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _error(values: Sequence[float]) -> float:
    """The standard error of the mean; 0 of a single value."""
    if len(values) < 2:
        return 0.0
    mean = _mean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
