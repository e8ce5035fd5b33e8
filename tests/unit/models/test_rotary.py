"""Rotary frequencies against transformers' own functions, and the tables by complex numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from nla_megatron.models.rotary import RotaryTables, rope_frequencies, rotated
from nla_megatron.types import RopeScaling
from tests.support.tiny import SHAPE

HEAD = 64
SCALINGS: dict[str, RopeScaling] = {
    "linear": RopeScaling("linear", 8.0),
    "llama3": RopeScaling("llama3", 32.0, 8192, 1.0, 4.0),
    "yarn": RopeScaling("yarn", 4.0, 32768),
    "yarn of gpt-oss": RopeScaling("yarn", 32.0, 4096, truncate=False),
    "yarn with a factor": RopeScaling("yarn", 4.0, 64, beta_fast=16.0, beta_slow=2.0, attention_factor=0.7),
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("theta", [1e4, 1.5e5])
def test_scaled_frequencies_are_those_of_transformers(name: str, theta: float) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = SCALINGS[name]
    parameters: dict[str, Any] = {"rope_type": scaling.kind, "rope_theta": theta, "factor": scaling.factor}
    if scaling.kind != "linear":
        parameters["original_max_position_embeddings"] = scaling.original_max_positions
    if scaling.kind == "llama3":
        parameters |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        parameters |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
        parameters |= {"attention_factor": scaling.attention_factor} if scaling.attention_factor else {}
    config = LlamaConfig(
        hidden_size=8 * HEAD, num_attention_heads=8, max_position_embeddings=131072, rope_parameters=parameters
    )
    theirs, their_factor = ROPE_INIT_FUNCTIONS[scaling.kind](config, torch.device("cpu"))
    ours, our_factor = rope_frequencies(replace(SHAPE, head_dim=HEAD, rope_theta=theta, rope_scaling=scaling))
    assert our_factor == pytest.approx(their_factor, rel=1e-12)
    torch.testing.assert_close(ours, theirs, rtol=3e-7, atol=0)


def test_frequencies_without_scaling_are_powers_of_the_base() -> None:
    ours, factor = rope_frequencies(replace(SHAPE, head_dim=8, rope_theta=16.0))
    assert (ours.tolist(), factor) == ([1.0, 0.5, 0.25, 0.125], 1.0)


def test_blocks_with_a_window_have_their_own_base_and_no_scaling() -> None:
    shape = replace(SHAPE, head_dim=4, rope_theta=1e6, rope_scaling=SCALINGS["linear"])
    local = rope_frequencies(replace(shape, local_rope_theta=100.0), local=True)[0]
    assert local.tolist() == pytest.approx([1.0, 0.1])
    # Without a base of their own they are like all others.
    assert torch.equal(rope_frequencies(shape, local=True)[0], rope_frequencies(shape)[0])


def test_turning_is_multiplication_by_a_complex_number() -> None:
    shape = replace(SHAPE, head_dim=8, rope_scaling=SCALINGS["yarn with a factor"])
    heads = torch.randn(5, 2, 3, 8, generator=torch.Generator().manual_seed(0))
    out = rotated(heads, *RotaryTables(shape)(5, heads))
    frequencies, factor = rope_frequencies(shape)
    turn = torch.polar(torch.full((5, 4), factor), torch.arange(5.0)[:, None] * frequencies)[:, None, None]
    expected = torch.complex(heads[..., :4], heads[..., 4:]) * turn
    torch.testing.assert_close(out, torch.cat([expected.real, expected.imag], dim=-1))


def test_tables_are_made_again_for_another_length_or_dtype_and_can_be_trained_through() -> None:
    tables = RotaryTables(SHAPE)
    with torch.inference_mode():
        cos, _ = tables(3, torch.zeros(()))
    assert tables(3, torch.zeros(()))[0] is cos and not cos.is_inference()
    assert tables(4, torch.zeros(()))[0].shape == (4, 1, 1, SHAPE.head_dim)
    assert tables(4, torch.zeros((), dtype=torch.bfloat16))[0].dtype == torch.bfloat16
