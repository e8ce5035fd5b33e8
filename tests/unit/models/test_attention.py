"""Core attention with windows, caps and sinks against transformers' plain attention."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nla_megatron.models.attention import SdpaCoreAttention, visible
from tests.support.tiny import SHAPE

LENGTH, ROWS, HEADS, GROUPS, WIDTH = 9, 2, 4, 2, 8
PLAIN = replace(SHAPE, num_heads=HEADS, num_kv_heads=GROUPS, head_dim=WIDTH)
WINDOWS = (4, None, None, None)


def core(shape: Any, block: int = 0) -> SdpaCoreAttention:
    config: Any = SimpleNamespace(shape=shape, tensor_model_parallel_size=1, params_dtype=torch.float32)
    return SdpaCoreAttention(config, layer_number=block + 1, pg_collection=SimpleNamespace(tp=None))


@pytest.mark.parametrize("window", [1, 4, LENGTH - 1, LENGTH, LENGTH + 3])
def test_a_window_counts_tokens_as_transformers_does(window: int) -> None:
    from transformers.masking_utils import sliding_window_causal_mask_function

    theirs = sliding_window_causal_mask_function(window)
    at = torch.arange(LENGTH)
    wanted = theirs(torch.tensor(0), torch.tensor(0), at[:, None], at[None])
    assert torch.equal(visible(LENGTH, window, torch.device("cpu")), wanted)


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize(
    "features",
    [
        {},
        {"query_scale": 0.3},
        {"windows": WINDOWS},
        {"windows": WINDOWS, "attention_softcap": 1.5},
        {"windows": WINDOWS, "sinks": True},
    ],
    ids=lambda features: "+".join(features) or "plain",
)
def test_attention_is_that_of_transformers(features: dict[str, Any], block: int) -> None:
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as capped
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as with_sinks

    generator = torch.Generator().manual_seed(0)
    shape = replace(PLAIN, **features)
    ours = core(shape, block)
    q, k, v = (torch.randn(LENGTH, ROWS, n, WIDTH, generator=generator) * 2 for n in (HEADS, GROUPS, GROUPS))
    scale = features.get("query_scale", WIDTH**-0.5)
    mask = torch.zeros(LENGTH, LENGTH).masked_fill(
        ~visible(LENGTH, shape.window_of(block), torch.device("cpu")), float("-inf")
    )
    module: Any = SimpleNamespace(num_key_value_groups=HEADS // GROUPS, training=False)
    their_q, their_k, their_v = (tensor.permute(1, 2, 0, 3) for tensor in (q, k, v))
    if ours.softmax_offset is None:
        expected, _ = capped(
            module, their_q, their_k, their_v, mask, scaling=scale, softcap=features.get("attention_softcap")
        )
    else:
        with torch.no_grad():
            ours.softmax_offset.copy_(torch.randn(HEADS, generator=generator))
        module.sinks = ours.softmax_offset
        expected, _ = with_sinks(module, their_q, their_k, their_v, mask, scaling=scale)
    out = ours(q, k, v, None)
    torch.testing.assert_close(out, expected.transpose(0, 1).flatten(2), rtol=1e-5, atol=1e-6)


def test_a_cap_so_high_that_it_does_nothing_gives_what_sdpa_gives() -> None:
    q, k, v = (torch.randn(LENGTH, ROWS, n, WIDTH, generator=torch.Generator().manual_seed(1)) for n in (4, 2, 2))
    for windows in ((), WINDOWS):
        capped, free = (
            core(replace(PLAIN, windows=windows, attention_softcap=1e4)),
            core(replace(PLAIN, windows=windows)),
        )
        torch.testing.assert_close(capped(q, k, v, None), free(q, k, v, None), rtol=1e-4, atol=1e-5)
