"""Runs side by side: one entry per checkpoint, sorted by one figure, the seeds of a configuration together."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from nla_megatron.contract.files import atomic_path
from nla_megatron.errors import ConfigError
from nla_megatron.evaluation.runs import SEED, Run, short_names, varying

FINAL = "final"
FIRST_CHOICES = ("fve_av", "reward_gain", "accuracy", "richness", "eval_fve", "reward", "loss")
CSV, JSON = "results.csv", "results.json"
_LESS_IS_BETTER = ("loss", "mse", "error", "kl", "seconds", "failed", "truncated")


@dataclass(frozen=True)
class Entry:
    """A run at one of its checkpoints, with the figures of its evaluation (none where it was not evaluated)."""

    run: Run
    checkpoint: str
    step: int
    figures: Mapping[str, float]

    @property
    def name(self) -> str:
        return self.run.name if self.checkpoint == FINAL else f"{self.run.name}@{self.checkpoint}"

    def value(self, metric: str, last: int) -> float | None:
        """A figure of the evaluation, else of the run's own, else the scalar it logged up to this checkpoint."""
        own = self.run.figures() if self.checkpoint == FINAL else {}
        return {**own, **self.figures}.get(metric, self.run.scalar(metric, last, self.step))


@dataclass(frozen=True)
class Group:
    """The entries that differ in nothing but the seed."""

    label: str
    entries: tuple[Entry, ...]
    values: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation (n - 1); None below two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Comparison:
    """Entries under a folder, and by what they are compared."""

    root: Path
    entries: Sequence[Entry]
    metric: str
    best: str
    last: int
    unfinished: Sequence[str] = ()
    failed: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def keys(self) -> list[str]:
        """The keys in which the runs differ."""
        return varying([entry.run for entry in self.entries])

    @cached_property
    def ranked(self) -> list[Entry]:
        """Entries, the best first; those without the metric last."""
        return sorted(self.entries, key=lambda entry: (self._order(self.value(entry)), entry.name))

    @cached_property
    def groups(self) -> list[Group]:
        """Groups, the best mean first."""
        members: dict[tuple[str, ...], list[Entry]] = {}
        for entry in self.entries:
            members.setdefault((*(str(entry.run.values.get(key)) for key in self.keys), entry.checkpoint), []).append(
                entry
            )
        groups = [
            Group(self.label(entries[0]), tuple(entries),
                  tuple(value for entry in entries if (value := self.value(entry)) is not None))
            for entries in members.values()
        ]  # fmt: skip
        return sorted(groups, key=lambda group: (self._order(group.mean), group.label))

    def _order(self, value: float | None) -> float:
        if value is None:
            return float("inf")
        return -value if self.best == "max" else value

    def value(self, entry: Entry) -> float | None:
        return entry.value(self.metric, self.last)

    def label(self, entry: Entry) -> str:
        """What is special about an entry's configuration, as `lr=0.0001, kl_coef=0`."""
        short = short_names(self.keys)
        parts = [f"{short[key]}={entry.run.values.get(key)}" for key in self.keys]
        parts += [f"step {entry.step}"] if entry.checkpoint != FINAL else []
        return ", ".join(parts) or "all runs"


def chosen_metric(entries: Sequence[Entry], metric: str | None, last: int) -> str:
    """The metric to sort by. Raises ConfigError where no entry has it."""
    for name in FIRST_CHOICES if metric is None else (metric,):
        if any(entry.value(name, last) is not None for entry in entries):
            return name
    known = {*(name for entry in entries for name in (*entry.figures, *entry.run.figures()))}
    known |= {name for entry in entries for row in entry.run.metrics for name in row} - {"step", "nonfinite"}
    raise ConfigError(
        f"metric={metric}, which no run has" if metric else "runs without a figure to compare",
        f"one of {', '.join(sorted(known))}" if known else "a scalar of metrics.jsonl or a figure of an evaluation",
        "correct metric=",
    )  # fmt: skip


def direction(metric: str, best: str | None) -> str:
    """Whether the largest or the smallest value is the best."""
    return best or ("min" if any(word in metric.split("_") for word in _LESS_IS_BETTER) else "max")


def rows(comparison: Comparison) -> list[dict[str, Any]]:
    """One flat record per entry, the best first: what it is, the metric, then every figure."""
    found = []
    for entry in comparison.ranked:
        record: dict[str, Any] = {"run": entry.run.name, "checkpoint": entry.checkpoint, "step": entry.step}
        record |= {key: entry.run.values.get(key) for key in comparison.keys}
        record |= {SEED: entry.run.values.get(SEED), comparison.metric: comparison.value(entry)}
        own = entry.run.figures() if entry.checkpoint == FINAL else {}
        logged = {name: entry.run.scalar(name, comparison.last, entry.step) for name in scalars(entry.run)}
        found.append({**{f"train.{name}": value for name, value in logged.items()}, **own, **entry.figures, **record})
    order = list(dict.fromkeys([*_first_columns(comparison), *sorted({key for row in found for key in row})]))
    return [{key: row.get(key) for key in order} for row in found]


def _first_columns(comparison: Comparison) -> list[str]:
    return ["run", "checkpoint", "step", *comparison.keys, SEED, comparison.metric]


def scalars(run: Run) -> list[str]:
    """The names that a run has logged."""
    return list(dict.fromkeys(name for row in run.metrics for name in row if name not in ("step", "nonfinite")))


def write_tables(comparison: Comparison, out: Path) -> None:
    """`results.csv`, one line per entry, and `results.json` with the groups beside them."""
    records = rows(comparison)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(records[0]))
    writer.writeheader()
    writer.writerows(records)
    with atomic_path(out / CSV) as path:
        path.write_text(text.getvalue(), encoding="utf-8")
    groups = [
        {"label": group.label, "n": len(group.values), "mean": group.mean, "std": group.std,
         "runs": [entry.name for entry in group.entries]}
        for group in comparison.groups
    ]  # fmt: skip
    content = {
        "root": str(comparison.root), "metric": comparison.metric, "best": comparison.best, "groups": groups,
        "runs": records, "unfinished": list(comparison.unfinished), "failed": dict(comparison.failed),
    }  # fmt: skip
    with atomic_path(out / JSON) as path:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
