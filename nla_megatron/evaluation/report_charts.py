"""Which columns of a run's metrics become which charts of its report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from nla_megatron.evaluation.charts import Points, line_chart, stacked_bars
from nla_megatron.evaluation.denominator import denominator
from nla_megatron.evaluation.report_files import Row, RunFiles

PHASES = {
    "generate": "generate", "score": "score", "look": "log-probs", "policy": "AV", "learn": "AR", "reload": "reload",
}  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """One line chart of columns (column to name in the legend) of a metrics table."""

    title: str
    unit: str
    columns: Mapping[str, str]
    note: str
    log: bool = False


RL_PLOTS = (
    Plot("Reward", "mean over the step’s rollouts", {"reward": "reward"}, "Higher is a closer reconstruction."),
    Plot("KL from the SFT model", "nats per token", {"kl": "KL"}, "How far RL has moved what the AV says."),
    Plot("Entropy", "nats per token", {"entropy": "entropy"}, "A fall to zero means the AV says one thing only."),
    Plot("Explanation length", "tokens", {"response_length": "length"}, "Mean over the step’s rollouts."),
    Plot(
        "Truncated and failed explanations",
        "share of rollouts",
        {"truncated": "truncated", "extraction_failed": "no explanation found"},
        "A rollout without an explanation earns no more than a random direction would.",
    ),
    Plot(
        "Log-prob gap between sampler and trainer",
        "nats per token, logarithmic",
        {"logprob_gap": "gap"},
        "About 0.02 is rounding in bf16; from 0.2 on, the two did not inject the same activation.",
        log=True,
    ),
    Plot("AR loss during RL", "mean squared error", {"ar_loss": "AR"}, "The AR learns on the AV’s own explanations."),
    Plot(
        "Gradient norms",
        "before clipping, logarithmic",
        {"policy_grad_norm": "AV", "ar_grad_norm": "AR"},
        "Steady is healthy; a jump names the step to look at.",
        log=True,
    ),
)


def _points(rows: Iterable[Row], column: str) -> Points:
    return [(row["step"], row[column]) for row in rows if column in row]


def _figure(svg: str, note: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(note)}</figcaption></figure>"


def _section(heading: str, caption: str, figures: Sequence[str]) -> str:
    if not any(figures):
        return ""
    return f'<h2>{heading}</h2><p class="caption">{caption}</p><div class="charts">{"".join(figures)}</div>'


def _plot(plot: Plot, rows: Sequence[Row]) -> str:
    series = {name: points for column, name in plot.columns.items() if (points := _points(rows, column))}
    return _figure(line_chart(series, plot.title, plot.unit, plot.log), plot.note) if series else ""


def rl_charts(run: RunFiles) -> str:
    """The section of the RL stage, or nothing if it has not run."""
    if not run.rl:
        return ""
    columns = {"eval_fve": "held out", "batch_fve": "rollouts"}
    fve = {name: points for column, name in columns.items() if (points := _points(run.rl, column))}
    references = {"gold text": run.summary.get("fve_gold_text"), "SFT": run.summary.get("fve_sft")}
    levels = {name: value for name, value in references.items() if value is not None}
    figures = [_plot(plot, run.rl) for plot in RL_PLOTS]
    if fve:
        chart = line_chart(fve, "Fraction of variance explained", "FVE", references=levels)
        compared = denominator(run.summary.get("fve_baseline"), run.summary.get("fve_baseline_rows"))
        note = f"1 is a perfect reconstruction, 0 {compared}. Held out the AV writes greedily, in rollouts it samples."
        figures.insert(0, _figure(chart, note))
    seconds = {name: points for key, name in PHASES.items() if (points := _points(run.rl, f"seconds_{key}"))}
    if seconds:
        note = "Sampling, scoring with the AR, log-probs before the update, the two updates, and the hand-over."
        figures.append(_figure(stacked_bars(seconds, "Time per step", "seconds"), note))
    return _section("Reinforcement learning", "Point at a line to read its values.", figures)


def sft_charts(run: RunFiles) -> str:
    """The section of the losses before RL, or nothing if no such stage has run."""
    stages = (
        (run.pretrain, "Pre-training", "cross-entropy, nats per token", "The base model, made for this run."),
        (run.sft_av, "AV, supervised", "cross-entropy, nats per token", "On the tokens of the gold explanations."),
        (run.sft_ar, "AR, supervised", "mean squared error", "Reconstruction from the gold explanations."),
    )
    figures = [_plot(Plot(title, unit, {"loss": "loss"}, note), rows) for rows, title, unit, note in stages if rows]
    return _section("Before RL", "Losses of the supervised stages.", figures)
