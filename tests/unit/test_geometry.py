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


@pytest.mark.parametrize("function", [lambda p, t: g.row_mse(p, t, SQRT), g.cosine])
def test_one_row_is_never_broadcast_over_many(function) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="shape"):
        function(vectors(1, 4), vectors(3, 4))


def test_deviations_and_variance_by_hand() -> None:
    target = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # Under √2 the rows are (√2, 0) and (0, √2), their mean (√2/2, √2/2): every difference squared is 1/2.
    torch.testing.assert_close(g.own_deviation(target, SQRT), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(g.deviation(target, torch.tensor([1.0, 0.0]), None), torch.tensor([0.0, 1.0]))
    # The mean is the rows' own: of two, half of what there is between them is lost.
    assert (g.variance(target, SQRT), g.variance(target, None)) == pytest.approx((1.0, 0.5))
    assert g.fve(torch.tensor([0.1, 0.3]), g.own_deviation(target, SQRT)) == pytest.approx(1 - 0.2 / 0.5)


def test_the_variance_of_a_few_rows_is_that_of_many_on_average() -> None:
    rows = vectors(30_000, 8)
    few = [g.variance(part, None) for part in rows.split(3)]
    assert float(np.mean(few)) == pytest.approx(1.0, abs=0.02)
    with pytest.raises(ValueError, match="at least two"):
        g.variance(rows[:1], None)


def test_fve_is_one_for_the_target_zero_for_the_mean_and_negative_for_worse() -> None:
    target = vectors(50, 8, shift=1.0)
    elsewhere = g.normalise(vectors(400, 8, seed=3, shift=1.0), SQRT).mean(dim=0)
    for mean in (elsewhere, g.normalise(target, SQRT).mean(dim=0)):
        deviation = g.deviation(target, mean)
        assert g.fve(g.row_mse(target, target), deviation) == pytest.approx(1.0)
        predicted = (mean.expand(50, 8) - g.normalise(target, SQRT)).square().mean(dim=1)
        assert g.fve(predicted, deviation) == pytest.approx(0.0, abs=1e-5)
        assert g.fve(g.row_mse(-target, target), deviation) < 0


def test_fve_is_r_squared_over_all_entries() -> None:
    """1 - sum of squared residuals / total sum of squares, over all entries: about their own mean, or any other."""
    pred, target = vectors(30, 6, 1), vectors(30, 6, 2, shift=0.5)
    p, t = (np.asarray(x.double() / x.double().norm(dim=1, keepdim=True) * math.sqrt(6)) for x in (pred, target))
    mse, mean = g.row_mse(pred, target), vectors(1, 6, 3)[0]
    for deviation, centre in (
        (g.own_deviation(target), t.mean(axis=0)),
        (g.deviation(target, mean), mean.double().numpy()),
    ):
        expected = 1 - np.square(p - t).sum() / np.square(t - centre).sum()
        assert g.fve(mse, deviation) == pytest.approx(expected, abs=1e-5)


def test_fve_without_variance_or_with_other_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="without variance"):
        g.fve(torch.zeros(1), g.own_deviation(vectors(1, 4), SQRT))
    with pytest.raises(ValueError, match="rows"):
        g.fve(torch.zeros(2), torch.ones(3))


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
    found = g.mean_estimate(values, documents(40, 25), n=2000)
    half = 1.96 * values[::25].std() / math.sqrt(40)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)
    assert found.value == pytest.approx(values.mean())
    assert (found.low + found.high) / 2 == pytest.approx(values.mean(), abs=0.1 * half)
    free = g.mean_estimate(values, [str(i) for i in range(1000)], n=500)
    assert free.high - free.low < (found.high - found.low) / 3


@pytest.mark.parametrize("count", [10, 40])
def test_an_interval_is_fixed_by_its_seed_and_grows_with_its_level(count: int) -> None:
    values, ids = np.arange(3.0 * count), documents(count, 3)

    def estimate(**options: float) -> list[float]:
        return g.ratio_of_sums(values, np.ones(len(values)), ids, n=200, **options).interval  # type: ignore[arg-type]

    # Of few documents it is Student's, and nothing is drawn.
    assert estimate(seed=1) == estimate(seed=1) and (estimate(seed=1) != estimate(seed=2)) == (count == 40)
    assert estimate(level=0.5)[0] > estimate(level=0.99)[0]
    assert estimate(level=0.5)[1] < estimate(level=0.99)[1]
    with pytest.raises(ValueError, match="level"):
        estimate(level=95)


def test_students_t_is_that_of_the_tables() -> None:
    found = [g.student(0.95, freedom) for freedom in (1, 2, 3, 9, 28)]
    assert found == pytest.approx([12.7062, 4.30265, 3.18245, 2.26216, 2.04841], abs=1e-4)
    assert g.student(0.99, 10) == pytest.approx(3.16927, abs=1e-4) and g.student(0.95, 2000) == pytest.approx(
        1.9612, abs=1e-4
    )


def test_the_interval_of_a_few_documents_is_the_t_interval_of_their_means() -> None:
    """Five documents of three rows: by hand from five means, t of four degrees of freedom."""
    values = np.random.default_rng(1).standard_normal(15)
    means = values.reshape(5, 3).mean(axis=1)
    half = 2.776445 * means.std(ddof=1) / math.sqrt(5)
    found = g.mean_estimate(values, documents(5, 3))
    assert found.interval == pytest.approx([means.mean() - half, means.mean() + half], rel=1e-5)
    assert g.mean_estimate(values, documents(5, 3), bounds=(-0.1, 0.1)).interval == [-0.1, 0.1]


ROWS, WIDTH, TRAINED_ON = 8, 32, 400


def evaluation(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """MSE and deviations of documents whose rows share half of the variance, which the mean of others predicts."""
    shared, own = (rng.standard_normal((count, rows, WIDTH)) * math.sqrt(0.5) for rows in (1, ROWS))
    error = 0.3 * shared + 0.7 * own + 0.5 * rng.standard_normal((count, ROWS, WIDTH))
    mean = rng.standard_normal(WIDTH) * math.sqrt(0.5 / TRAINED_ON)
    return np.square(error).mean(axis=-1).ravel(), np.square(shared + own - mean).mean(axis=-1).ravel()


TRUTH = 1 - (0.3**2 * 0.5 + 0.7**2 * 0.5 + 0.5**2) / (1 + 0.5 / TRAINED_ON)


@pytest.mark.parametrize("count", [3, 10, 50, 200])
def test_a_95_percent_interval_holds_the_truth_in_9_of_10_evaluations(count: int) -> None:
    """Also of a difference; and however few the documents, the figure is right on average."""
    rng, ids, values, held, held_gains = np.random.default_rng(count), documents(count, ROWS), [], 0, 0
    repetitions = 300
    for seed in range(repetitions):
        mse, deviation = evaluation(count, rng)
        found = g.fve_estimate(mse, deviation, ids, n=200, seed=seed)
        values.append(found.value)
        held += found.low <= TRUTH <= found.high
        assert found.low <= found.value <= found.high <= 1
        gain = g.fve_difference(0.8 * mse, mse, deviation, ids, n=200, seed=seed)
        held_gains += gain.low <= 0.2 * (1 - TRUTH) <= gain.high
    assert held / repetitions >= 0.9 and held_gains / repetitions >= 0.9
    assert np.mean(values) == pytest.approx(TRUTH, abs=0.01)


def test_an_fve_and_its_interval_are_of_the_sums_over_documents() -> None:
    """Documents of one to four rows: the bootstrap draws documents, each with all of its rows."""
    rng = np.random.default_rng(2)
    ids = [f"d{document}" for document in range(60) for _ in range(1 + document % 4)]
    mse, deviation = rng.random(len(ids)), 1 + rng.random(len(ids))
    found = g.fve_estimate(mse, deviation, ids, n=4000)
    assert found.value == pytest.approx(g.fve(torch.tensor(mse), torch.tensor(deviation)))
    rows = [np.flatnonzero(np.array(ids) == name) for name in dict.fromkeys(ids)]
    drawn = [np.concatenate([rows[j] for j in rng.integers(60, size=60)]) for _ in range(4000)]
    slow = np.quantile([1 - mse[each].sum() / deviation[each].sum() for each in drawn], [0.025, 0.975])
    assert found.interval == pytest.approx(slow.tolist(), abs=0.1 * (found.high - found.low))
    order = rng.permutation(len(ids))
    mixed = g.fve_estimate(mse[order], deviation[order], [ids[i] for i in order], n=4000)
    assert mixed.value == pytest.approx(found.value)
    assert mixed.interval == pytest.approx(found.interval, abs=0.1 * (found.high - found.low))


@pytest.mark.parametrize("count", [10, 60])
def test_the_paired_difference_cancels_what_the_rows_share(count: int) -> None:
    mse, deviation = evaluation(count, np.random.default_rng(4))
    better, ids = mse - 0.02, documents(count, ROWS)
    found, apart = g.fve_difference(better, mse, deviation, ids), g.fve_estimate(better, deviation, ids)
    assert found.value == pytest.approx(apart.value - g.fve_estimate(mse, deviation, ids).value)
    assert 0 < found.low <= found.value <= found.high
    assert found.high - found.low < (apart.high - apart.low) / 5
    assert g.fve_difference(mse, mse, deviation, ids).interval == [0.0, 0.0]
    assert g.fve_difference(mse, better, deviation, ids).value == pytest.approx(-found.value)


def test_too_few_documents_and_uneven_lengths_are_refused() -> None:
    mse, deviation = evaluation(5, np.random.default_rng(5))
    ids = documents(5, ROWS)
    with pytest.raises(ValueError, match="at least two"):
        g.fve_estimate(mse, deviation, ["d"] * len(mse))
    with pytest.raises(ValueError, match="document ids"):
        g.fve_estimate(mse, deviation, ids[:-1])
    with pytest.raises(ValueError, match="numbers of shape"):
        g.fve_estimate(mse[:-1], deviation, ids)
    with pytest.raises(ValueError, match="without variance"):
        g.fve_estimate(mse, np.zeros_like(deviation), ids)


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
    assert g.mean_estimate(values_N, prompts, 200, 0, g.SHARE).interval == [0.0, 1.0]
