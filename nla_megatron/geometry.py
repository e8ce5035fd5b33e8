"""Distances between activations: normalisation, MSE, rewards, the mean baseline, FVE, and their confidence intervals.

Everything is computed in fp32 whatever the input's dtype (intervals in float64). Shapes: N rows, D hidden, J documents,
S resamples. With the default scale `"sqrt_d_model"`, MSE = 2(1 - cos): 0 for equal directions, 2 for orthogonal ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Scale = str | float | None  # "sqrt_d_model", a norm, or None for raw vectors

ORTHOGONAL_MSE = 2.0  # what a reconstruction that says nothing gets under the default scale
_MIN_NORM = 1e-12  # keeps zero vectors zero instead of NaN
_MIN_MSE = 1e-6  # an exact reconstruction has a finite log reward; fp32 rounding alone gives about this much
_RESAMPLES_AT_ONCE = 64


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


def variance(target_ND: Tensor, scale: Scale = "sqrt_d_model") -> float:
    """The MSE of predicting the mean: `mean((v̂ - μ)²)` over rows and dimensions, μ the mean of these same rows."""
    v_ND = normalise(target_ND, scale)
    return float((v_ND - v_ND.mean(dim=0)).square().mean(dim=-1).double().mean())


def fve(pred_ND_or_mse_N: Tensor, target_ND: Tensor, scale: Scale = "sqrt_d_model") -> float:
    """Fraction of variance explained, `1 - mean MSE / variance`, over these rows.

    Args:
        pred_ND_or_mse_N: predictions (N, D), or their `row_mse` (N,) under the same scale.
        target_ND: the activations of the same rows.
        scale: as for `normalise`.

    Raises:
        ValueError: targets without variance (one row, or equal rows), or another number of rows.
    """
    mse_N = pred_ND_or_mse_N if pred_ND_or_mse_N.ndim == 1 else row_mse(pred_ND_or_mse_N, target_ND, scale)
    if len(mse_N) != len(target_ND):
        raise ValueError(f"{len(mse_N)} rows of predictions for {len(target_ND)} targets")
    spread = variance(target_ND, scale)
    if not spread > 0:
        raise ValueError(f"{len(target_ND)} target rows without variance: the FVE is not defined")
    return 1.0 - float(mse_N.double().mean()) / spread


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


def mean_ci(values_N: np.ndarray, groups: Sequence[str], n: int = 1000, seed: int = 0) -> list[float]:
    """The 95 % interval [low, high] of a mean, from resampling whole groups: documents, or the prompts of samples."""
    return list(bootstrap_ci(values_N, groups, lambda drawn: float(drawn.mean()), n, seed))


def bootstrap_ci(
    values_by_row: np.ndarray,
    doc_ids: Sequence[str],
    statistic: Callable[[np.ndarray], float],
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """A percentile interval of `statistic`, from resampling whole documents, since rows of one document are alike.

    Args:
        values_by_row: (N, ...), handed to `statistic` with the rows of the drawn documents.
        doc_ids: the document of each row.
        statistic: from rows to a number.
        n: resamples.
        seed: the same seed gives the same interval.
        level: share of the resamples inside the interval.

    Raises:
        ValueError: fewer than two documents, or other lengths.
    """
    rows_of_J = _rows_by_document(doc_ids, len(values_by_row))
    rng = np.random.default_rng(seed)
    draws_SJ = rng.integers(len(rows_of_J), size=(n, len(rows_of_J)))
    results_S = [statistic(values_by_row[np.concatenate([rows_of_J[j] for j in draw_J])]) for draw_J in draws_SJ]
    return _interval(np.asarray(results_S, dtype=np.float64), level)


def fve_bootstrap(
    mse: np.ndarray,
    targets_normalised: np.ndarray,
    doc_ids: Sequence[str],
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """FVE with its interval: (fve, lo, hi). Documents are resampled, and the variance is that of each resample.

    Args:
        mse: (N,), from `row_mse`.
        targets_normalised: (N, D), the targets after `normalise` with the scale of the MSE.
        doc_ids, n, seed, level: as for `bootstrap_ci`.

    Raises:
        ValueError: fewer than two documents, targets without variance, or other lengths.
    """
    value, drawn_S = _resampled_fve([mse], targets_normalised, doc_ids, n, seed)
    return (float(value[0]), *_interval(drawn_S[:, 0], level))


def paired_fve_difference(
    mse_a: np.ndarray,
    mse_b: np.ndarray,
    targets: np.ndarray,
    doc_ids: Sequence[str],
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """FVE of `a` minus FVE of `b` on the same rows, with its interval: (difference, lo, hi).

    Both are drawn with the same documents, so what the rows have in common cancels out. `targets` are normalised;
    arguments and errors are those of `fve_bootstrap`.
    """
    value, drawn_S = _resampled_fve([mse_a, mse_b], targets, doc_ids, n, seed)
    return (float(value[0] - value[1]), *_interval(drawn_S[:, 0] - drawn_S[:, 1], level))


def _resampled_fve(
    mse: list[np.ndarray], targets_ND: np.ndarray, doc_ids: Sequence[str], n: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """FVE of each MSE column on all rows (M,) and on `n` resamples (S, M), from sums per document.

    A resample counts document j w_j times. With each document's number of rows, sum of vectors, sum of squares and sums
    of MSE, everything an FVE needs is linear in w, and no row is read again.
    """
    rows_of_J = _rows_by_document(doc_ids, len(targets_ND))
    if any(column.shape != (len(targets_ND),) for column in mse):
        raise ValueError(f"MSE of shape {[column.shape for column in mse]} for {len(targets_ND)} targets")
    mse_NM = np.stack(mse, axis=1).astype(np.float64)
    # The variance does not depend on the origin; a central one keeps the difference of squares below exact.
    origin_D = targets_ND.mean(axis=0, dtype=np.float64)
    count_J = np.array([len(rows) for rows in rows_of_J], dtype=np.float64)
    error_JM = np.stack([mse_NM[rows].sum(axis=0) for rows in rows_of_J])
    sum_JD = np.empty((len(rows_of_J), targets_ND.shape[1]))
    square_J = np.empty(len(rows_of_J))
    for j, rows in enumerate(rows_of_J):
        centred_RD = targets_ND[rows] - origin_D
        sum_JD[j], square_J[j] = centred_RD.sum(axis=0), np.square(centred_RD).sum()

    def fve_of(weight_SJ: np.ndarray) -> np.ndarray:
        total_S = weight_SJ @ count_J
        mean_SD = (weight_SJ @ sum_JD) / total_S[:, None]
        spread_S = ((weight_SJ @ square_J) / total_S - np.square(mean_SD).sum(axis=1)) / targets_ND.shape[1]
        # A resample of equal rows has no variance and no FVE; rounding leaves it a little above or below zero.
        spread_S[spread_S <= 1e-9 * square_J.sum() / count_J.sum() / targets_ND.shape[1]] = np.nan
        return 1.0 - (weight_SJ @ error_JM) / total_S[:, None] / spread_S[:, None]

    value_M = fve_of(np.ones((1, len(rows_of_J))))[0]
    if np.isnan(value_M).any():
        raise ValueError(f"{len(targets_ND)} target rows without variance: the FVE is not defined")
    rng = np.random.default_rng(seed)
    uniform_J = np.full(len(rows_of_J), 1.0 / len(rows_of_J))
    parts = []
    for start in range(0, n, _RESAMPLES_AT_ONCE):
        size = min(_RESAMPLES_AT_ONCE, n - start)
        parts.append(fve_of(rng.multinomial(len(rows_of_J), uniform_J, size=size).astype(np.float64)))
    return value_M, np.concatenate(parts)


def _rows_by_document(doc_ids: Sequence[str], n_rows: int) -> list[np.ndarray]:
    """The rows of each document, in the order in which documents first appear."""
    if len(doc_ids) != n_rows:
        raise ValueError(f"{len(doc_ids)} document ids for {n_rows} rows")
    rows: dict[str, list[int]] = {}
    for row, doc_id in enumerate(doc_ids):
        rows.setdefault(doc_id, []).append(row)
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} document(s): resampling documents needs at least two")
    return [np.asarray(one) for one in rows.values()]


def _interval(values_S: np.ndarray, level: float) -> tuple[float, float]:
    """The central `level` of the values that are defined."""
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    tail = (1.0 - level) / 2.0
    lo, hi = np.nanquantile(values_S, [tail, 1.0 - tail])
    return float(lo), float(hi)


def _same_shape(pred_ND: Tensor, target_ND: Tensor) -> None:
    # Broadcasting (1, D) over (N, D) would compare every row with one target, and nothing would look wrong.
    if pred_ND.shape != target_ND.shape:
        raise ValueError(f"predictions {tuple(pred_ND.shape)} and targets {tuple(target_ND.shape)} differ in shape")
