"""Each injection mode by hand and as a property. Legend: N positions, D hidden."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nla_megatron.interventions.maths import FORMULAS, add, check_vectors, norm_add, replace

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STREAM, VECTOR = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, -10.0]])

cases = given(
    n=st.integers(1, 5),
    d=st.integers(2, 48),
    seed=st.integers(0, 10**6),
    scale=st.floats(0.25, 4),
    size=st.floats(0.1, 50),
)


def draw(n: int, d: int, seed: int, size: float) -> tuple[Tensor, Tensor]:
    """A stream and vectors whose norms differ from row to row."""
    generator = torch.Generator().manual_seed(seed)
    stream_ND, vectors_ND = torch.randn(2, n, d, generator=generator) + 0.01
    return stream_ND, vectors_ND * size * torch.arange(1, n + 1)[:, None]


def intervene(method: str, stream_ND: Tensor, vectors_ND: Tensor, scale: float) -> Tensor:
    """The stream afterwards, in its dtype."""
    return FORMULAS[method].whole(stream_ND, vectors_ND, torch.tensor(scale)).to(stream_ND.dtype)


def delta(method: str, stream_ND: Tensor, vectors_ND: Tensor, scale: float) -> Tensor:
    """What is added to it."""
    return FORMULAS[method].change(stream_ND, vectors_ND, torch.tensor(scale)).to(stream_ND.dtype)


def norms(x_ND: Tensor) -> Tensor:
    return x_ND.float().norm(dim=-1)


@pytest.mark.parametrize(
    ("method", "scale", "by_hand"),
    [
        ("norm_add", 1.0, [3.0, -1.0]),  # |x| = 5 along (0, -1)
        ("norm_add", 0.5, [3.0, 1.5]),
        ("add", 1.0, [3.0, -6.0]),
        ("add", 0.5, [3.0, -1.0]),
        ("replace", 1.0, [0.0, -1.0]),
        ("replace", 150.0, [0.0, -150.0]),
    ],
)
def test_each_mode_by_hand(method: str, scale: float, by_hand: list[float]) -> None:
    torch.testing.assert_close(intervene(method, STREAM, VECTOR, scale), torch.tensor([by_hand]))


def test_every_mode_has_a_hand_calculation() -> None:
    assert set(FORMULAS) == {"norm_add", "add", "replace"}


@cases
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_add_adds_the_streams_own_size_along_the_vector(
    dtype: torch.dtype, n: int, d: int, seed: int, scale: float, size: float
) -> None:
    """In fp32 whatever the stream's dtype: a norm taken in bf16 would be off by up to 0.4 %."""
    stream_ND, vectors_ND = draw(n, d, seed, size)
    stream_ND = stream_ND.to(dtype)
    added_ND = norm_add(stream_ND, vectors_ND, scale) - stream_ND.float()
    torch.testing.assert_close(norms(added_ND), scale * norms(stream_ND), rtol=1e-4, atol=1e-5)
    cosine_N = torch.nn.functional.cosine_similarity(added_ND, vectors_ND)
    torch.testing.assert_close(cosine_N, torch.ones(n), rtol=1e-4, atol=1e-4)


@cases
@pytest.mark.parametrize("dtype", DTYPES)
def test_replace_leaves_the_vector_at_the_given_norm(
    dtype: torch.dtype, n: int, d: int, seed: int, scale: float, size: float
) -> None:
    stream_ND, vectors_ND = draw(n, d, seed, size)
    out_ND = replace(stream_ND.to(dtype), vectors_ND, scale)
    torch.testing.assert_close(norms(out_ND), torch.full((n,), scale), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out_ND, replace(torch.zeros(n, d), vectors_ND, scale))


@cases
def test_add_is_linear_in_the_raw_vector(n: int, d: int, seed: int, scale: float, size: float) -> None:
    stream_ND, vectors_ND = draw(n, d, seed, size)
    torch.testing.assert_close(add(stream_ND, vectors_ND, scale), stream_ND + scale * vectors_ND)


@cases
@pytest.mark.parametrize("method", list(FORMULAS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stream_plus_delta_is_the_intervention(
    dtype: torch.dtype, method: str, n: int, d: int, seed: int, scale: float, size: float
) -> None:
    """The trainer replaces the stream, the sampler adds to it; they must end at the same place, in the same dtype."""
    stream_ND, vectors_ND = draw(n, d, seed, size)
    stream_ND = stream_ND.to(dtype)
    whole, change = intervene(method, stream_ND, vectors_ND, scale), delta(method, stream_ND, vectors_ND, scale)
    assert whole.dtype == change.dtype == dtype and whole.shape == change.shape == stream_ND.shape
    # Two roundings against one: within two units in the last place of the largest term.
    largest = torch.stack([stream_ND.float().abs(), change.float().abs(), whole.float().abs()]).amax(0)
    assert ((stream_ND + change).float() - whole.float()).abs().le(2 * torch.finfo(dtype).eps * largest + 1e-7).all()


@pytest.mark.parametrize("method", ["norm_add", "replace"])
def test_only_the_vectors_direction_counts_where_the_size_is_given(method: str) -> None:
    assert torch.equal(intervene(method, STREAM, VECTOR, 2.0), intervene(method, STREAM, VECTOR * 8, 2.0))


@pytest.mark.parametrize("method", list(FORMULAS))
def test_rows_do_not_mix(method: str) -> None:
    stream_ND, vectors_ND = draw(4, 8, 0, 3.0)
    together = intervene(method, stream_ND, vectors_ND, 1.5)
    alone = [intervene(method, stream_ND[i : i + 1], vectors_ND[i : i + 1], 1.5) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("method", list(FORMULAS))
def test_gradients_reach_the_stream_unless_it_is_replaced(method: str) -> None:
    stream_ND = STREAM.clone().requires_grad_()
    out = intervene(method, stream_ND, VECTOR, 1.0).sum() + 0 * stream_ND.sum()
    [gradient] = torch.autograd.grad(out, stream_ND)
    assert bool(gradient.abs().sum() > 0) == (method != "replace")


def test_vectors_that_cannot_be_injected_are_counted() -> None:
    nan, inf = float("nan"), float("inf")
    tiny = 1e-30  # its square is zero in fp32, so it has no direction either
    vectors = torch.tensor([[1.0, 2.0], [0.0, 0.0], [nan, 1.0], [-inf, 1.0], [tiny, 0.0], [1e-10, 0.0], [inf, nan]])
    assert check_vectors(vectors) == 5
    assert check_vectors(vectors[:1]) == 0
    assert check_vectors(torch.ones(3, 4096, dtype=torch.float16) * 3000) == 0  # the norm overflows fp16, not fp32
