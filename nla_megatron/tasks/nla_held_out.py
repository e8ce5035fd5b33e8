"""What a held-out figure of the task `nla` is measured on and by: one rule for `eval` and for evaluations within `rl`.

Rows are drawn document by document, the AV writes greedily, and the FVE compares with the mean of the training rows.
Legend: N rows, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from nla_megatron import geometry
from nla_megatron.contract import columns
from nla_megatron.contract.baseline import read_baseline
from nla_megatron.errors import ConfigError, SidecarError
from nla_megatron.rollout.requests import PromptRequest
from nla_megatron.tasks.nla import NlaTask
from nla_megatron.tasks.nla_checks import MSE_SCALE

TRAINING_ROWS, EVALUATED_ROWS = "training_rows", "evaluated_rows"
"""Whose mean an FVE compares with."""
_DRAW = 5


@dataclass(frozen=True)
class Baseline:
    """The mean predictor of a table. `mean_D`: of so many training `rows`; None where the table does not know it."""

    mean_D: np.ndarray | None
    rows: int = 0

    @classmethod
    def of(cls, task: NlaTask) -> Baseline:
        """That which the table's sidecar names. Raises MissingFile or SidecarError."""
        spec = task.sidecar.baseline
        if spec is None:
            return cls(None)
        if spec.scale != MSE_SCALE:
            raise SidecarError(
                f"baseline.scale = {spec.scale!r} in the sidecar of {task.table.path}",
                f"{MSE_SCALE!r}, as errors have it", "build the table again",
            )  # fmt: skip
        return cls(read_baseline(task.table.path, spec, task.table.d_model), spec.rows)

    @property
    def whose(self) -> str:
        return EVALUATED_ROWS if self.mean_D is None else TRAINING_ROWS

    def note(self, task: NlaTask) -> str | None:
        """What to tell whoever reads the figures, where they are not what they usually are."""
        if self.mean_D is not None:
            return None
        return (
            f"note: the sidecar of {task.table.path} names no mean of the training rows: it was built before there was "
            "one, or by another trainer. FVE compares with the mean of the evaluated rows in its place"
        )

    def deviations(self, task: NlaTask, rows: Sequence[int]) -> Tensor:
        """(N,): the error of the mean predictor on these rows."""
        import torch

        targets_ND = task.normalised_targets(rows)
        if self.mean_D is None:
            return geometry.own_deviation(targets_ND, None)
        return geometry.deviation(targets_ND, torch.from_numpy(self.mean_D), None)


@dataclass(frozen=True)
class Measure:
    """Rows with what FVEs of theirs are divided by, and how their intervals are drawn."""

    deviation_N: Tensor
    own_deviation_N: Tensor
    documents: tuple[str, ...]
    resamples: int = 1000
    seed: int = 0

    @classmethod
    def of(
        cls, task: NlaTask, baseline: Baseline, rows: Sequence[int], resamples: int = 1000, seed: int = 0
    ) -> Measure:
        documents = task.table.column(columns.DOC_ID)
        own_N = geometry.own_deviation(task.normalised_targets(rows), None)
        return cls(baseline.deviations(task, rows), own_N, tuple(documents[row] for row in rows), resamples, seed)

    @property
    def variance(self) -> float:
        """The mean predictor's error on average over rows: what an FVE is a fraction of."""
        return float(self.deviation_N.double().mean())

    def fve(self, mse_N: Tensor) -> geometry.Estimate:
        return geometry.fve_estimate(mse_N.numpy(), self.deviation_N.numpy(), self.documents, self.resamples, self.seed)

    def fve_in_sample(self, mse_N: Tensor) -> float:
        """As others report it: compared with the mean of these very rows."""
        return geometry.fve(mse_N, self.own_deviation_N)

    def gain(self, mse_N: Tensor, over_N: Tensor) -> geometry.Estimate:
        """The FVE of one minus that of another on the same rows."""
        return geometry.fve_difference(
            mse_N.numpy(), over_N.numpy(), self.deviation_N.numpy(), self.documents, self.resamples, self.seed
        )


def held_out_rows(task: NlaTask, count: int, seed: int) -> list[int]:
    """`count` rows, or all: one of each document, then another of each, documents and their rows in a drawn order.

    Rows of one document are alike, so that the figure is the surer the more documents it is of. Fewer rows at the same
    seed are the first of more.
    """
    documents = task.table.column(columns.DOC_ID)
    order = np.random.default_rng([seed, _DRAW]).permutation(len(documents)).tolist()
    drawn: dict[str, int] = {}
    round_of: dict[int, int] = {}
    first: dict[str, int] = {}
    for place, row in enumerate(order):
        document = documents[row]
        round_of[row] = drawn.get(document, 0)
        drawn[document] = round_of[row] + 1
        first.setdefault(document, place)
    return sorted(order, key=lambda row: (round_of[row], first[documents[row]]))[:count]


def check_rows(task: NlaTask, count: int, seed: int, key: str) -> None:
    """Raises ConfigError where the rows that `key` asks for are too few to measure anything."""
    available = min(count, task.table.n_rows)
    if available < 2:
        raise ConfigError(f"{available} rows to evaluate", "at least 2", f"raise {key}=, or hold out more")
    documents = task.table.column(columns.DOC_ID)
    if len(set(documents)) < 2:  # then any two rows that are drawn are of two
        raise ConfigError(
            f"held-out rows of one document in {task.table.path}", "at least two documents", "hold out more"
        )
    rows = held_out_rows(task, count, seed)
    if not float(geometry.own_deviation(task.normalised_targets(rows), None).sum()) > 0:
        raise ConfigError(
            f"{len(rows)} rows of one and the same activation in {task.table.path}", "rows that differ",
            f"raise {key}=, or extract activations again",
        )  # fmt: skip


def greedy(requests: Sequence[PromptRequest]) -> list[PromptRequest]:
    """The same, answered by the likeliest tokens."""
    return [replace(request, greedy=True) for request in requests]
