"""The page of a comparison: one HTML file that needs nothing beside itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from nla_megatron import __version__
from nla_megatron.contract.files import atomic_path
from nla_megatron.evaluation.charts import format_value
from nla_megatron.evaluation.comparison import CSV, FINAL, JSON, Comparison, Entry, Group, rows
from nla_megatron.evaluation.comparison_charts import SHOWN, Curve, configurations
from nla_megatron.evaluation.denominator import GENERAL
from nla_megatron.evaluation.report_style import STYLE
from nla_megatron.evaluation.runs import SEED, short_names

PAGE = "report.html"
# Figures that have a column of their own on the page, where a run has them; the tables hold all.
COLUMNS = {
    "fve_av": "FVE",
    "fve_in_sample_av": "FVE, in-sample",
    "fve_gold": "FVE, gold text",
    "fve_shuffled": "FVE, shuffled",
    "accuracy": "Accuracy",
    "accuracy_strict": "Accuracy, strict",
    "format_rate": "In the format",
    "thinking_tokens_mean": "Thinking tokens, mean",
    "thinking_tokens_median": "Thinking tokens, median",
    "train.reward": "Reward",
    "train.response_length": "Response tokens",
}
_MORE_STYLE = """
.wide { overflow-x: auto; }
.wide table { width: 100%; }
.wide th, .wide td { white-space: nowrap; }
td.plot { min-width: 160px; }
code.name { white-space: nowrap; }
"""


def write_page(comparison: Comparison, charts: Sequence[Curve], path: Path) -> None:
    """The page: the best configuration, all configurations with their seeds, all runs, learning curves."""
    name = comparison.root.resolve().name
    sections = (_head(comparison, name), _groups(comparison), _runs(comparison), _curves(charts, comparison),
                _missing(comparison))  # fmt: skip
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}: runs compared</title><style>{STYLE}{_MORE_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(section for section in sections if section)
        + f"\n<footer>Written by nla_megatron {__version__} from the files of the runs; every figure is in "
        f"<code>{CSV}</code> and <code>{JSON}</code>.</footer>\n</main></body></html>\n"
    )
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")


def _number(value: float | None, digits: int = 4, decimals: int | None = None) -> str:
    """The value to `decimals` places, else to `digits` significant digits, with the exact one in the markup."""
    if value is None:
        return '<span class="muted">–</span>'
    text = format_value(value, digits) if decimals is None else f"{value:,.{decimals}f}".replace("-", "−")
    return f'<data value="{value!r}">{text}</data>'


def _decimals(values: Sequence[float | None]) -> int | None:
    """The places that show the largest of a column to four digits; None where the column spans too much for places."""
    sizes = [abs(value) for value in values if value]
    if not sizes or max(sizes) >= 1e6 or max(sizes) < 1e-3:
        return None
    if all(size.is_integer() for size in sizes):
        return 0
    return max(0, 3 - math.floor(math.log10(max(sizes))))


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _spread(group: Group) -> str:
    if group.std is None:
        return "one seed" if group.values else "no value"
    return f"± {_number(group.std, 2)} over {len(group.values)} seeds"


def _head(comparison: Comparison, name: str) -> str:
    first = comparison.groups[0]
    runs = len({entry.run.name for entry in comparison.entries})
    order = "largest" if comparison.best == "max" else "smallest"
    kept = len({entry.checkpoint for entry in comparison.entries})
    sentence = (
        f"{_counted(runs, 'finished run')} of {_counted(len(configurations(comparison)), 'configuration')}"
        f"{f', each at up to {kept} checkpoints' if kept > 1 else ''}; sorted by "
        f"<code>{escape(comparison.metric)}</code>, the {order} first. Runs that differ only in their seed are one "
        "configuration."
    )
    facts = {"Best configuration": escape(first.label), "Spread": _spread(first),
             "Folder": f"<code>{escape(str(comparison.root))}</code>"}  # fmt: skip
    listed = "".join(f"<div><dt>{key}</dt><dd>{text}</dd></div>" for key, text in facts.items())
    return (
        f'<p class="kicker">Runs compared</p><h1>{escape(name)}</h1><p>{sentence}</p>'
        f'<section class="head" aria-label="Best configuration"><div><div class="hero">{_number(first.mean, 3)}</div>'
        f'<p class="hero-label">{escape(comparison.metric)}, mean of the best configuration</p></div>'
        f'<dl class="facts" style="margin:0">{listed}</dl></section>'
    )


def _groups(comparison: Comparison) -> str:
    values = [value for group in comparison.groups for value in group.values]
    spreads = [(group.mean or 0.0, group.std or 0.0) for group in comparison.groups if group.values]
    low = min([*values, *(mean - std for mean, std in spreads)], default=0.0)
    high = max([*values, *(mean + std for mean, std in spreads)], default=1.0)
    scale = (low, high) if high > low else (low - 1, high + 1)
    places = _decimals(values)
    body = "".join(_group(group, scale, places, place == 0) for place, group in enumerate(comparison.groups))
    span = f"{format_value(scale[0], 3)} to {format_value(scale[1], 3)}"
    return (
        '<h2>Configurations</h2><p class="caption">Mean and sample standard deviation over seeds; small marks are '
        'single runs, the band is one standard deviation to either side.</p><div class="wide"><table><thead><tr>'
        '<th scope="col">Configuration</th>'
        f'<th scope="col" class="number">Mean</th><th scope="col" class="number">Std</th>'
        f'<th scope="col" class="number">n</th><th scope="col" class="plot">{span}</th></tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _group(group: Group, scale: tuple[float, float], places: int | None, best: bool) -> str:
    return (
        f'<tr{" class=main" if best else ""}><th scope="row">{escape(group.label)}</th>'
        f'<td class="number">{_number(group.mean, decimals=places)}</td><td class="number">{_number(group.std, 2)}</td>'
        f'<td class="number">{len(group.values)}</td><td class="plot">{_mark(group, scale)}</td></tr>'
    )


def _mark(group: Group, scale: tuple[float, float]) -> str:
    if group.mean is None:
        return ""

    def at(value: float) -> float:
        return 100 * (value - scale[0]) / (scale[1] - scale[0])

    std = group.std or 0.0
    low, high = at(group.mean - std), at(group.mean + std)
    whisker = f'<i class="whisker" style="left:{low:.1f}%;width:{high - low:.1f}%"></i>' if std else ""
    single = "".join(f'<i class="zero" style="left:{at(value):.1f}%"></i>' for value in group.values)
    return (
        f'<div class="mark"><i class="scale"></i>{whisker}{single}'
        f'<i class="dot" style="left:{at(group.mean):.1f}%"></i></div>'
    )


def _runs(comparison: Comparison) -> str:
    records = rows(comparison)
    shown = [
        name for name in COLUMNS if name != comparison.metric and any(row.get(name) is not None for row in records)
    ]
    short = short_names(comparison.keys)
    checkpoints = any(entry.checkpoint != FINAL for entry in comparison.entries)
    titles = ["Run", *(["Step"] if checkpoints else []), *(short[key] for key in comparison.keys), "Seed"]
    numbers = [comparison.metric, *shown]
    places = {name: _decimals([row.get(name) for row in records]) for name in numbers}
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    head += "".join(f'<th scope="col" class="number">{escape(COLUMNS.get(name, name))}</th>' for name in numbers)
    body = ""
    for entry, record in zip(comparison.ranked, records, strict=True):
        cells = [str(record.get(key)) for key in (*(["step"] if checkpoints else []), *comparison.keys, SEED)]
        body += (
            f'<tr><th scope="row"><code class="name">{escape(entry.run.name)}</code>{_failed(comparison, entry)}</th>'
        )
        body += "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        body += (
            "".join(f'<td class="number">{_number(record.get(name), decimals=places[name])}</td>' for name in numbers)
            + "</tr>"
        )
    note = f"Scalars of training are means over the last {comparison.last} steps that have them."
    if any("fve" in name for name in numbers):
        note += f" FVE: 1 is a perfect reconstruction, {GENERAL}; greedy texts."
    return (
        f'<h2>Runs</h2><p class="caption">{note}</p><div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _failed(comparison: Comparison, entry: Entry) -> str:
    return ' <span class="bad">evaluation failed</span>' if entry.name in comparison.failed else ""


def _curves(charts: Sequence[Curve], comparison: Comparison) -> str:
    if not charts:
        return ""
    note = "Each line is a configuration, the mean over its seeds. Point at a line to read its values."
    if len(configurations(comparison)) > SHOWN:
        note += f" Only the best {SHOWN} configurations are drawn."
    figures = "".join(f"<figure>{chart.svg}</figure>" for chart in charts)
    return f'<h2>Learning curves</h2><p class="caption">{note}</p><div class="charts">{figures}</div>'


def _missing(comparison: Comparison) -> str:
    lines = [f"<li><code>{escape(name)}</code>: not finished</li>" for name in comparison.unfinished]
    lines += [
        f"<li><code>{escape(name)}</code>: {escape(why) or 'evaluation failed'}</li>"
        for name, why in comparison.failed.items()
    ]
    return f"<h2>Left out</h2><ul>{''.join(lines)}</ul>" if lines else ""
