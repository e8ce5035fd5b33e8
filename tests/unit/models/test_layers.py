"""Norms bit for bit as transformers computes them; what a query sees; scales and caps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nla_megatron.models.attention import visible
from nla_megatron.models.layers import RmsNorm, scale_output, soft_capped

WIDTH = 48


def norm(zero_centered: bool, dtype: torch.dtype, sequence_parallel: bool = False) -> RmsNorm:
    config: Any = SimpleNamespace(
        layernorm_zero_centered_gamma=zero_centered, params_dtype=dtype, sequence_parallel=sequence_parallel
    )
    return RmsNorm(config, WIDTH, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zero_centered", [False, True])
def test_a_norm_is_that_of_transformers(zero_centered: bool, dtype: torch.dtype) -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    generator = torch.Generator().manual_seed(0)
    theirs = (Gemma3RMSNorm if zero_centered else LlamaRMSNorm)(WIDTH, 1e-5).to(dtype)
    ours = norm(zero_centered, dtype)
    # Both start as the plain norm, so that a new model of either kind starts alike.
    stream = (torch.randn(7, 3, WIDTH, generator=generator) * 5).to(dtype)
    with torch.no_grad():
        torch.testing.assert_close(ours(stream), theirs(stream), rtol=1e-6, atol=1e-6)
        theirs.weight.copy_(torch.randn(WIDTH, generator=generator))
        ours.weight.copy_(theirs.weight)
        exact = 0.0 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(ours(stream), theirs(stream), rtol=exact, atol=exact)
    assert ours(stream).dtype == dtype


@pytest.mark.parametrize("on", [False, True])
def test_a_norms_weight_says_whether_its_gradient_is_summed_over_tp(on: bool) -> None:
    assert norm(False, torch.float32, on).weight.sequence_parallel is on  # type: ignore[attr-defined]


def test_a_window_counts_the_token_itself() -> None:
    seen = visible(5, 2, torch.device("cpu"))
    assert [row.nonzero().flatten().tolist() for row in seen] == [[0], [0, 1], [1, 2], [2, 3], [3, 4]]
    assert torch.equal(visible(5, None, torch.device("cpu")), torch.ones(5, 5).tril().bool())


def test_a_scale_is_rounded_to_the_outputs_dtype_first() -> None:
    """sqrt(3072) = 55.4256 is 55.5 in bfloat16, and Gemma was trained so."""
    module = torch.nn.Identity()
    scale_output(module, 3072**0.5)
    assert module(torch.ones(1, dtype=torch.bfloat16)).tolist() == [55.5]
    assert module(torch.ones(1)).item() == pytest.approx(3072**0.5)


def test_soft_capping_bounds_large_values_and_keeps_small_ones() -> None:
    values = torch.tensor([0.01, -300.0, 300.0])
    assert soft_capped(values, 30.0).tolist() == pytest.approx([0.01, -30.0, 30.0], rel=1e-4)
    assert soft_capped(values, None) is values
