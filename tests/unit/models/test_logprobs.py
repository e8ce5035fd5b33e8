"""Entropies under a temperature, where rows pad the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nla_megatron.config.schema import ParallelConfig
from nla_megatron.models.logprobs import token_entropy
from nla_megatron.parallel.world import World, initialise, shut_down


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    yield initialise(ParallelConfig())
    shut_down()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_rows_that_pad_the_vocabulary_do_not_change_an_entropy(world: World, temperature: float) -> None:
    logits = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([logits, torch.full((2, 3, 6), torch.finfo(torch.float32).min)], dim=-1)
    expected = torch.distributions.Categorical(logits=logits / temperature).entropy()
    torch.testing.assert_close(token_entropy(padded, temperature), expected)
