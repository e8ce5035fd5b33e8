from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nla_megatron import geometry as g

SQRT = "sqrt_d_model"


def vectors(n: int, d: int, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


def test_normalise_by_hand() -> None:
    v = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    root = math.sqrt(2)
    torch.testing.assert_close(g.normalise(v, SQRT), torch.tensor([[0.6 * root, 0.8 * root], [0.0, 0.0]]))
    torch.testing.assert_close(g.normalise(v, 10.0), torch.tensor([[6.0, 8.0], [0.0, 0.0]]))
    torch.testing.assert_close(g.normalise(v, None), v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_result_is_fp32(dtype: torch.dtype) -> None:
    v = vectors(3, 8).to(dtype)
    assert g.normalise(v, SQRT).dtype == torch.float32
    assert g.normalise(v, None).dtype == torch.float32
    assert g.row_mse(v, v + 1, SQRT).dtype == torch.float32
    assert g.cosine(v, v).dtype == torch.float32
    assert g.reward(v[0], "bounded").dtype == torch.float32


def test_half_precision_norms_do_not_overflow() -> None:
    v = torch.full((1, 4096), 3000.0, dtype=torch.float16)  # the sum of squares is far beyond 65504
    torch.testing.assert_close(g.normalise(v, SQRT), torch.ones(1, 4096))


@pytest.mark.parametrize("scale", ["sqrt", 0.0, -1.0, float("nan")])
def test_a_scale_that_means_nothing_is_refused(scale: g.Scale) -> None:
    with pytest.raises(ValueError, match="scale"):
        g.normalise(vectors(1, 2), scale)


@given(st.integers(1, 6), st.integers(2, 40), st.integers(0, 10**6), st.floats(0.01, 100))
def test_mse_is_twice_one_minus_cosine(n: int, d: int, seed: int, factor: float) -> None:
    pred, target = vectors(n, d, seed), vectors(n, d, seed + 1)
    expected = torch.nn.functional.cosine_similarity(pred, target)
    torch.testing.assert_close(g.cosine(pred, target), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(g.row_mse(factor * pred, target, SQRT), 2 * (1 - expected), atol=1e-5, rtol=1e-4)


def test_raw_mse_by_hand() -> None:
    mse = g.row_mse(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[3.0, 2.0], [1.0, 1.0]]), None)
    torch.testing.assert_close(mse, torch.tensor([2.0, 1.0]))


def test_the_mse_has_the_gradient_of_its_definition() -> None:
    pred, target = vectors(2, 5).double().requires_grad_(), vectors(2, 5, 1).double()
    (gradient,) = torch.autograd.grad(g.row_mse(pred, target, SQRT).sum(), pred)
    cos = torch.nn.functional.cosine_similarity(pred, target)
    (expected,) = torch.autograd.grad((2 * (1 - cos)).sum(), pred)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


def test_a_zero_prediction_has_a_finite_gradient() -> None:
    pred = torch.zeros(1, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(g.row_mse(pred, vectors(1, 4), SQRT).sum(), pred)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("function", [lambda p, t: g.row_mse(p, t, SQRT), g.cosine, lambda p, t: g.fve(p, t, SQRT)])
def test_one_row_is_never_broadcast_over_many(function) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="shape"):
        function(vectors(1, 4), vectors(3, 4))


def test_variance_and_fve_by_hand() -> None:
    target = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # Under √2 the rows are (√2, 0) and (0, √2), their mean (√2/2, √2/2): every difference squared is 1/2.
    assert g.variance(target, SQRT) == pytest.approx(0.5)
    assert g.fve(torch.tensor([0.1, 0.3]), target, SQRT) == pytest.approx(1 - 0.2 / 0.5)
    assert g.variance(target, None) == pytest.approx(0.25)


def test_fve_is_one_for_the_target_zero_for_the_mean_and_negative_for_worse() -> None:
    target = vectors(50, 8, shift=1.0)
    assert g.fve(target, target, SQRT) == pytest.approx(1.0)
    mean = g.normalise(target, SQRT).mean(dim=0).expand(50, 8)
    mse = (mean - g.normalise(target, SQRT)).square().mean(dim=1)
    assert g.fve(mse, target, SQRT) == pytest.approx(0.0, abs=1e-5)
    assert g.fve(-target, target, SQRT) < 0


def test_fve_is_r_squared_over_all_entries() -> None:
    """1 - sum of squared residuals / total sum of squares, over all entries."""
    pred, target = vectors(30, 6, 1), vectors(30, 6, 2, shift=0.5)
    p, t = (np.asarray(x.double() / x.double().norm(dim=1, keepdim=True) * math.sqrt(6)) for x in (pred, target))
    expected = 1 - np.square(p - t).sum() / np.square(t - t.mean(axis=0)).sum()
    assert g.fve(pred, target, SQRT) == pytest.approx(expected, abs=1e-5)


def test_fve_without_variance_or_with_other_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="without variance"):
        g.fve(torch.zeros(1), vectors(1, 4), SQRT)
    with pytest.raises(ValueError, match="rows"):
        g.fve(torch.zeros(2), vectors(3, 4), SQRT)


@pytest.mark.parametrize(
    ("transform", "expected", "failed"),
    [
        ("negative", [-0.5, -2.0], -2.0),
        ("log", [math.log(2), -math.log(2)], -math.log(2)),
        ("exp", [math.exp(-0.5), math.exp(-2)], math.exp(-2)),
        ("bounded", [2 / 3, 1 / 3], 1 / 3),
    ],
)
def test_rewards_by_hand(transform: str, expected: list[float], failed: float) -> None:
    torch.testing.assert_close(g.reward(torch.tensor([0.5, 2.0]), transform), torch.tensor(expected))
    assert g.failed_reward(transform) == pytest.approx(failed)


@pytest.mark.parametrize("transform", ["negative", "log", "exp", "bounded"])
def test_a_smaller_mse_is_a_larger_finite_reward(transform: str) -> None:
    rewards = g.reward(torch.tensor([0.0, 1e-3, 0.1, 1.0, 2.0, 4.0]), transform)
    assert rewards.isfinite().all()
    assert (rewards.diff() < 0).all()


def test_temperature_is_that_of_exp() -> None:
    assert g.reward(torch.tensor(0.5), "exp", 3.0).item() == pytest.approx(math.exp(-1.5))
    assert g.failed_reward("exp", 3.0) == pytest.approx(math.exp(-6))
    assert g.failed_reward("negative", 3.0) == -2.0


def test_an_unknown_transform_is_refused() -> None:
    with pytest.raises(ValueError, match="'square'"):
        g.reward(torch.zeros(1), "square")


def documents(n: int, rows: int) -> list[str]:
    return [f"d{i // rows}" for i in range(n * rows)]


def test_documents_are_resampled_not_rows() -> None:
    """Equal rows within a document: the interval is that of the documents, wider than that of as many free rows."""
    rng = np.random.default_rng(0)
    values = np.repeat(rng.standard_normal(40), 25)
    lo, hi = g.bootstrap_ci(values, documents(40, 25), lambda x: float(x.mean()), n=2000)
    half = 1.96 * values[::25].std() / math.sqrt(40)
    assert (hi - lo) / 2 == pytest.approx(half, rel=0.1)
    assert (lo + hi) / 2 == pytest.approx(values.mean(), abs=0.1 * half)
    free_lo, free_hi = g.bootstrap_ci(values, [str(i) for i in range(1000)], lambda x: float(x.mean()), n=500)
    assert free_hi - free_lo < (hi - lo) / 3


def test_an_interval_is_fixed_by_its_seed_and_grows_with_its_level() -> None:
    values, ids = np.arange(30.0), documents(10, 3)

    def interval(**options: float) -> tuple[float, float]:
        return g.bootstrap_ci(values, ids, lambda x: float(x.mean()), n=200, **options)  # type: ignore[arg-type]

    assert interval(seed=1) == interval(seed=1) != interval(seed=2)
    assert interval(level=0.5)[0] > interval(level=0.99)[0]
    assert interval(level=0.5)[1] < interval(level=0.99)[1]
    with pytest.raises(ValueError, match="level"):
        interval(level=95)


def evaluation(n_documents: int = 60, rows: int = 4, d: int = 6) -> tuple[np.ndarray, np.ndarray, list[str]]:
    target = g.normalise(vectors(n_documents * rows, d, 5, shift=0.7), SQRT)
    pred = target + 0.6 * vectors(n_documents * rows, d, 6)
    mse = (pred - target).square().mean(dim=1)
    return mse.numpy(), target.numpy(), documents(n_documents, rows)


def test_fve_bootstrap_agrees_with_recomputing_every_resample() -> None:
    mse, target, ids = evaluation()
    packed = np.concatenate([mse[:, None], target], axis=1).astype(np.float64)

    def from_rows(rows: np.ndarray) -> float:
        spread = np.square(rows[:, 1:] - rows[:, 1:].mean(axis=0)).mean()
        return float(1 - rows[:, 0].mean() / spread)

    value, lo, hi = g.fve_bootstrap(mse, target, ids, n=4000)
    slow_lo, slow_hi = g.bootstrap_ci(packed, ids, from_rows, n=4000, seed=1)
    assert value == pytest.approx(from_rows(packed), abs=1e-9)
    assert value == pytest.approx(g.fve(torch.tensor(mse), torch.tensor(target), None), abs=1e-5)
    assert (lo, hi) == pytest.approx((slow_lo, slow_hi), abs=0.1 * (hi - lo))
    assert lo < value < hi


def test_fve_bootstrap_does_not_depend_on_row_order() -> None:
    mse, target, ids = evaluation()
    order = np.argsort(np.random.default_rng(0).random(len(ids)))
    ordered = g.fve_bootstrap(mse, target, ids, n=500)
    mixed = g.fve_bootstrap(mse[order], target[order], [ids[i] for i in order], n=500)
    assert mixed[0] == pytest.approx(ordered[0])
    assert mixed[1:] == pytest.approx(ordered[1:], abs=0.2 * (ordered[2] - ordered[1]))


def test_far_from_the_origin_the_variance_stays_exact() -> None:
    mse, target, ids = evaluation()
    near, far = (
        g.fve_bootstrap(mse, target, ids, n=50),
        g.fve_bootstrap(mse, target.astype(np.float64) + 1e6, ids, n=50),
    )
    assert far == pytest.approx(near, rel=1e-5)


def test_the_paired_difference_cancels_what_the_rows_share() -> None:
    mse, target, ids = evaluation()
    better = mse - 0.02
    difference, lo, hi = g.paired_fve_difference(better, mse, target, ids)
    apart = g.fve_bootstrap(better, target, ids)
    assert difference == pytest.approx(apart[0] - g.fve_bootstrap(mse, target, ids)[0])
    assert 0 < lo <= difference <= hi
    assert hi - lo < (apart[2] - apart[1]) / 5
    assert g.paired_fve_difference(mse, mse, target, ids)[0] == 0.0
    assert g.paired_fve_difference(mse, better, target, ids)[0] == pytest.approx(-difference)


def test_resamples_without_variance_are_left_out() -> None:
    """Two documents of one row each: half of the resamples hold one row twice."""
    target = np.array([[1.0, 0.0], [0.0, 1.0]])
    value, lo, hi = g.fve_bootstrap(np.array([0.05, 0.05]), target, ["a", "b"], n=200)
    assert (value, lo, hi) == pytest.approx((0.8, 0.8, 0.8))


def test_too_few_documents_and_uneven_lengths_are_refused() -> None:
    mse, target, ids = evaluation()
    with pytest.raises(ValueError, match="at least two"):
        g.fve_bootstrap(mse, target, ["d"] * len(mse))
    with pytest.raises(ValueError, match="document ids"):
        g.fve_bootstrap(mse, target, ids[:-1])
    with pytest.raises(ValueError, match="MSE of shape"):
        g.fve_bootstrap(mse[:-1], target, ids)
    with pytest.raises(ValueError, match="without variance"):
        g.fve_bootstrap(mse, np.ones_like(target), ids)


def test_importing_the_rooms_does_not_import_what_is_heavy() -> None:
    code = (
        "import sys, nla_megatron.geometry, nla_megatron.contract.tables, nla_megatron.contract.sidecar;"
        "import nla_megatron.contract.splits, nla_megatron.contract.columns;"
        "print([m for m in ('torch', 'transformers', 'pyarrow') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_interval_of_a_mean_is_over_prompts_whose_samples_are_alike() -> None:
    """Two prompts, one always right and one never: however many samples, nobody knows more than two answers tell."""
    values_N, prompts = np.repeat([0.0, 1.0], 50), np.repeat(["a", "b"], 50).tolist()
    assert g.mean_ci(values_N, prompts, 200, 0) == [0.0, 1.0]
