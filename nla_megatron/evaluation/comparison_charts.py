"""Learning curves of many runs: the mean over the seeds of a configuration, the best configurations in colour."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nla_megatron.contract.files import atomic_path
from nla_megatron.evaluation.charts import COLOURS, Points, line_chart
from nla_megatron.evaluation.comparison import FINAL, Comparison, Group, scalars

SAYING_MOST = (
    "eval_fve", "accuracy", "reward", "batch_fve", "loss", "kl", "entropy", "response_length", "av_grad_norm",
)  # fmt: skip
TITLES = {
    "eval_fve": ("Held-out FVE", "0 is the mean of the training rows"),
    "eval_fve_in_sample": ("Held-out FVE, in-sample", "0 is the mean of the evaluated rows"),
    "batch_fve": ("FVE of the rollouts", "0 is the mean of the training rows"),
    "fve_av": ("Held-out FVE", "0 is the mean of the training rows"),
    "fve_in_sample_av": ("Held-out FVE, in-sample", "0 is the mean of the evaluated rows"),
    "reward": ("Reward", "mean over the step’s rollouts"),
    "kl": ("KL from the policy that training starts from", "nats per token"),
    "entropy": ("Entropy", "nats per token"),
    "response_length": ("Response length", "tokens"),
    "loss": ("Loss", ""),
    "av_grad_norm": ("Gradient norm", "before clipping"),
    "accuracy": ("Accuracy", "share of answers"),
}
SHOWN = len(COLOURS)
_LABEL_LENGTH = 44


@dataclass(frozen=True)
class Curve:
    """One chart, and the scalar it is of."""

    name: str
    svg: str


def curves(comparison: Comparison, wanted: Sequence[str]) -> list[Curve]:
    """A chart for each scalar: those of `wanted`, else the metric and those that say most."""
    known = {name for entry in comparison.entries for name in scalars(entry.run)}
    names = list(wanted) or list(dict.fromkeys((comparison.metric, *SAYING_MOST)))
    drawn = [] if wanted else [chart for chart in (_over_checkpoints(comparison),) if chart]
    taken = {chart.name for chart in drawn}
    groups = configurations(comparison)[:SHOWN]
    for name in names:
        if name in known and name not in taken:
            title, unit = TITLES.get(name, (name.replace("_", " ").capitalize(), ""))
            drawn.append(
                Curve(name, line_chart({_short(group.label): _mean(group, name) for group in groups}, title, unit))
            )
    return drawn


def write_charts(charts: Sequence[Curve], folder: Path, png: bool) -> None:
    """Each chart as a file of its own."""
    from nla_megatron.evaluation.png import write_png

    for chart in charts:
        name = re.sub(r"[^\w.-]+", "-", chart.name)
        with atomic_path(folder / f"{name}.svg") as path:
            path.write_text(_standalone(chart.svg), encoding="utf-8")
        if png:
            write_png(chart.svg, folder / f"{name}.png")


def _standalone(svg: str) -> str:
    """Outside a page an SVG names its namespace, and sits on paper."""
    opened = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" style="background:#fff;color:#1d2126" ', 1)
    return opened + "\n"


def configurations(comparison: Comparison) -> list[Group]:
    """One group per configuration: checkpoints of a run share its curve."""
    seen: dict[frozenset[str], Group] = {}
    for group in comparison.groups:
        runs = frozenset(entry.run.name for entry in group.entries)
        if runs not in seen or group.entries[0].checkpoint == FINAL:
            seen.setdefault(runs, group)
    return list(seen.values())


def _mean(group: Group, name: str) -> Points:
    """Per step, the mean over the runs that have a value there."""
    runs = {entry.run.name: entry.run for entry in group.entries}.values()
    values: dict[int, list[float]] = {}
    for run in runs:
        for row in run.metrics:
            if row.get(name) is not None:
                values.setdefault(int(row["step"]), []).append(float(row[name]))
    return [(step, statistics.fmean(values[step])) for step in sorted(values)]


def _over_checkpoints(comparison: Comparison) -> Curve | None:
    """The metric at each checkpoint of a configuration, where there are several."""
    series: dict[str, dict[float, float]] = {}
    for group in comparison.groups:
        entry = group.entries[0]
        if group.mean is not None:
            label = _short(comparison.label(entry).removesuffix(f"step {entry.step}").rstrip(", ") or "all runs")
            series.setdefault(label, {})[float(entry.step)] = group.mean
    if max((len(points) for points in series.values()), default=0) < 2:
        return None
    title, unit = TITLES.get(comparison.metric, (comparison.metric, ""))
    shown = {label: sorted(points.items()) for label, points in list(series.items())[:SHOWN]}
    return Curve(comparison.metric, line_chart(shown, f"{title} by checkpoint", unit, x_label="step of the checkpoint"))


def _short(label: str) -> str:
    return label if len(label) <= _LABEL_LENGTH else label[: _LABEL_LENGTH - 1] + "…"
