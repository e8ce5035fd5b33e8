"""Tokens that enter a model have rows in its embedding."""

from __future__ import annotations

import pytest
import torch

from nla_megatron.errors import ColumnError
from nla_megatron.models.batching import Batch
from nla_megatron.models.logprobs import response_logprobs
from nla_megatron.models.pipeline import forward_rows
from nla_megatron.models.verbalizer import build_verbalizer
from nla_megatron.parallel.world import World
from tests.support.tiny import SHAPE


def test_a_batch_with_a_token_that_the_model_has_no_row_for_is_refused(world: World) -> None:
    """The matrix is filled up to a multiple of 128 rows: 600 to 640."""
    model = build_verbalizer(SHAPE, world, "float32")
    fields = {"mask": torch.ones(1, 3)}
    forward_rows(model, Batch(ids=[[1, 2, 599]], fields=fields), world, 1, response_logprobs(1.0), 3)
    with pytest.raises(ColumnError, match="token id 600 among"):
        forward_rows(model, Batch(ids=[[1, 600, 2]], fields=fields), world, 1, response_logprobs(1.0), 3)
