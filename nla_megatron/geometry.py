"""Distances between activations: normalisation, MSE, rewards, the mean baseline, FVE, and their confidence intervals.

Everything is computed in fp32 whatever the input's dtype (sums and intervals in float64). Shapes: N rows, D hidden,
J groups of rows, S resamples. With the default scale `"sqrt_d_model"`, MSE = 2(1 - cos): 0 for equal directions, 2 for
orthogonal ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Scale = str | float | None  # "sqrt_d_model", a norm, or None for raw vectors

SHARE = (0.0, 1.0)
"""Where a share or a probability lies."""
ANYWHERE = (-math.inf, math.inf)
ORTHOGONAL_MSE = 2.0  # what a reconstruction that says nothing gets under the default scale
_MIN_NORM = 1e-12  # keeps zero vectors zero instead of NaN
_MIN_MSE = 1e-6  # an exact reconstruction has a finite log reward; fp32 rounding alone gives about this much
_RESAMPLES_AT_ONCE = 64
_MANY_GROUPS = 30  # a bootstrap of fewer gives intervals that are too narrow


def normalise(v_ND: Tensor, scale: Scale) -> Tensor:
    """Vectors of norm √D (`"sqrt_d_model"`) or `scale` (a number), or unchanged (None), in fp32. Zero stays zero.

    Raises:
        ValueError: another string, or a number that is not positive.
    """
    v_ND = v_ND.float()
    if scale is None:
        return v_ND
    if isinstance(scale, str) and scale != "sqrt_d_model":
        raise ValueError(f"scale must be 'sqrt_d_model', a number or None, got {scale!r}")
    norm = math.sqrt(v_ND.shape[-1]) if isinstance(scale, str) else float(scale)
    if not norm > 0:
        raise ValueError(f"scale must be positive, got {scale!r}")
    return v_ND * (norm / v_ND.norm(dim=-1, keepdim=True).clamp_min(_MIN_NORM))


def row_mse(pred_ND: Tensor, target_ND: Tensor, scale: Scale = "sqrt_d_model") -> Tensor:
    """Mean squared difference of each row, both sides normalised: (N,). Differentiable in both."""
    _same_shape(pred_ND, target_ND)
    return (normalise(pred_ND, scale) - normalise(target_ND, scale)).square().mean(dim=-1)


def cosine(pred: Tensor, target: Tensor) -> Tensor:
    """Cosine of each pair of rows of two (N, D): (N,); 0 where one of them is zero."""
    _same_shape(pred, target)
    return (normalise(pred, 1.0) * normalise(target, 1.0)).sum(dim=-1)


def deviation(target_ND: Tensor, mean_D: Tensor, scale: Scale = "sqrt_d_model") -> Tensor:
    """The error of predicting `mean_D`, which is at the scale already, for each row: (N,)."""
    return (normalise(target_ND, scale) - mean_D.float()).square().mean(dim=-1)


def own_deviation(target_ND: Tensor, scale: Scale = "sqrt_d_model") -> Tensor:
    """The error of predicting these rows' own mean for each of them: (N,). Nobody could have known that mean."""
    v_ND = normalise(target_ND, scale)
    return deviation(v_ND, v_ND.double().mean(dim=0), None)


def variance(target_ND: Tensor, scale: Scale = "sqrt_d_model") -> float:
    """The variance of what the rows are drawn from, over dimensions on average: without bias, so divided by N - 1.

    Raises:
        ValueError: fewer than two rows.
    """
    if len(target_ND) < 2:
        raise ValueError(f"{len(target_ND)} row(s): a variance needs at least two")
    return float(own_deviation(target_ND, scale).double().sum()) / (len(target_ND) - 1)


def fve(mse_N: Tensor, deviation_N: Tensor) -> float:
    """Fraction of variance explained, `1 - sum of MSE / sum of deviations`, over these rows.

    Args:
        mse_N: `row_mse` of the predictions.
        deviation_N: what the mean predictor gets on the same rows under the same scale: `deviation` of the mean of the
            training rows, or `own_deviation`.

    Raises:
        ValueError: rows without deviation (one row, or equal rows), or another number of them.
    """
    if mse_N.shape != deviation_N.shape:
        raise ValueError(f"{len(mse_N)} rows of predictions for {len(deviation_N)} targets")
    return 1.0 - float(mse_N.double().sum()) / _positive(float(deviation_N.double().sum()), len(mse_N))


def reward(mse_N: Tensor, transform: str, temperature: float = 1.0) -> Tensor:
    """The reward of a reconstruction, falling with its MSE, in fp32 and with the shape of `mse_N`.

    Args:
        mse_N: from `row_mse`.
        transform: `negative` (-MSE), `log` (-log MSE), `exp` (exp(-T·MSE)) or `bounded` (1 / (1 + MSE)).
        temperature: T of `exp`; the others have none.

    Raises:
        ValueError: an unknown transform.
    """
    mse_N = mse_N.float()
    if transform == "negative":
        return -mse_N
    if transform == "log":
        return -mse_N.clamp_min(_MIN_MSE).log()
    if transform == "exp":
        return (-temperature * mse_N).exp()
    if transform == "bounded":
        return 1.0 / (1.0 + mse_N)
    raise ValueError(f"unknown reward transform {transform!r}; there are negative, log, exp and bounded")


def failed_reward(transform: str, temperature: float = 1.0) -> float:
    """The reward of a response without a valid explanation: that of an orthogonal reconstruction (-2, -log 2, ...)."""
    import torch

    return float(reward(torch.tensor(ORTHOGONAL_MSE), transform, temperature))


@dataclass(frozen=True)
class Estimate:
    """A figure with the 95 % interval from `low` to `high`."""

    value: float
    low: float
    high: float

    @property
    def interval(self) -> list[float]:
        return [self.low, self.high]


def ratio_of_sums(
    above_N: np.ndarray, below_N: np.ndarray, groups: Sequence[str], n: int = 1000, seed: int = 0, level: float = 0.95
) -> Estimate:
    """`sum above / sum below` with its interval; rows of one group (a document, a prompt) are alike, groups are not.

    What is above and below is fixed row by row, and whole groups are drawn. From 30 groups on the interval is the
    central `level` of `n` resamples of them (percentile bootstrap); of fewer, resamples spread too little, and it is
    Student's, with the ratio linearised in the groups' sums and one degree of freedom less than there are groups.

    Args:
        above_N, below_N: (N,) numbers of the rows.
        groups: of each row.
        n, seed: of the resamples; the same seed gives the same interval.

    Raises:
        ValueError: fewer than two groups, other lengths, or a sum below that is not positive.
    """
    if above_N.shape != below_N.shape or above_N.ndim != 1:
        raise ValueError(f"numbers of shape {above_N.shape} above, {below_N.shape} below")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    sums_JX = _sums_by_group(np.stack([above_N, below_N], axis=1).astype(np.float64), groups)
    total_above, total_below = sums_JX.sum(axis=0)
    value = float(total_above / _positive(float(total_below), len(below_N)))
    if len(sums_JX) >= _MANY_GROUPS:
        tail = (1.0 - level) / 2.0
        low, high = np.nanquantile(_resampled(sums_JX, n, seed), [tail, 1.0 - tail])
        return Estimate(value, float(low), float(high))
    count = len(sums_JX)
    residual_J = sums_JX[:, 0] - value * sums_JX[:, 1]
    error = math.sqrt(count / (count - 1) * float(np.square(residual_J).sum())) / float(total_below)
    half = student(level, count - 1) * error
    return Estimate(value, value - half, value + half)


def mean_estimate(
    values_N: np.ndarray,
    groups: Sequence[str],
    n: int = 1000,
    seed: int = 0,
    bounds: tuple[float, float] = ANYWHERE,
) -> Estimate:
    """The mean over rows as `ratio_of_sums` has it; no interval goes beyond `bounds`, where no value can lie."""
    found = ratio_of_sums(values_N, np.ones(len(values_N)), groups, n, seed)
    return Estimate(found.value, max(found.low, bounds[0]), min(found.high, bounds[1]))


def fve_estimate(
    mse_N: np.ndarray, deviation_N: np.ndarray, doc_ids: Sequence[str], n: int = 1000, seed: int = 0
) -> Estimate:
    """`fve` with its interval over documents, as `ratio_of_sums` has it; errors are those of the two."""
    lost = ratio_of_sums(mse_N, deviation_N, doc_ids, n, seed)
    return Estimate(1.0 - lost.value, 1.0 - lost.high, 1.0 - max(lost.low, 0.0))


def fve_difference(
    mse_a_N: np.ndarray,
    mse_b_N: np.ndarray,
    deviation_N: np.ndarray,
    doc_ids: Sequence[str],
    n: int = 1000,
    seed: int = 0,
) -> Estimate:
    """FVE of `a` minus FVE of `b` on the same rows: what both have in common cancels out of the interval."""
    return ratio_of_sums(mse_b_N.astype(np.float64) - mse_a_N, deviation_N, doc_ids, n, seed)


def student(level: float, freedom: int) -> float:
    """The t between whose negative and itself Student's distribution of `freedom` degrees has the share `level`.

    From the finite sums of the distribution at whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    even = freedom % 2 == 0
    angle_low, angle_high = 0.0, math.pi / 2
    for _ in range(100):
        angle = (angle_low + angle_high) / 2
        cosine_squared, term, total = math.cos(angle) ** 2, 1.0 if even else math.cos(angle), 0.0
        for k in range(2 if even else 3, freedom + 1, 2):
            total += term
            term *= cosine_squared * (k - 1) / k
        share = math.sin(angle) * total if even else 2 / math.pi * (angle + math.sin(angle) * total)
        angle_low, angle_high = (angle, angle_high) if share < level else (angle_low, angle)
    return math.tan(angle_low) * math.sqrt(freedom)


def _positive(total: float, rows: int) -> float:
    if not total > 0:
        raise ValueError(f"{rows} target rows without variance: the FVE is not defined")
    return total


def _resampled(sums_JX: np.ndarray, n: int, seed: int) -> np.ndarray:
    """The ratio in `n` resamples (S,), from sums per group: no row is read again."""
    rng = np.random.default_rng(seed)
    uniform_J = np.full(len(sums_JX), 1.0 / len(sums_JX))
    parts = []
    for start in range(0, n, _RESAMPLES_AT_ONCE):
        weight_SJ = rng.multinomial(len(sums_JX), uniform_J, size=min(_RESAMPLES_AT_ONCE, n - start))
        above_S, below_S = (weight_SJ @ sums_JX).T
        parts.append(above_S / np.where(below_S > 0, below_S, np.nan))  # a resample may have no variance at all
    return np.concatenate(parts)


def _sums_by_group(values_NX: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """(J, X), in the order in which groups first appear."""
    if len(groups) != len(values_NX):
        raise ValueError(f"{len(groups)} document ids for {len(values_NX)} rows")
    numbers: dict[str, int] = {}
    group_N = np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64)
    if len(numbers) < 2:
        raise ValueError(f"{len(numbers)} document(s): resampling documents needs at least two")
    sums_JX = np.zeros((len(numbers), values_NX.shape[1]))
    np.add.at(sums_JX, group_N, values_NX)
    return sums_JX


def _same_shape(pred_ND: Tensor, target_ND: Tensor) -> None:
    # Broadcasting (1, D) over (N, D) would compare every row with one target, and nothing would look wrong.
    if pred_ND.shape != target_ND.shape:
        raise ValueError(f"predictions {tuple(pred_ND.shape)} and targets {tuple(target_ND.shape)} differ in shape")
