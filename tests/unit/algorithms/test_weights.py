"""How losses of tokens are averaged, by hand, and that cutting a batch into microbatches changes nothing."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nla_megatron.algorithms.correction import correction_weights
from nla_megatron.algorithms.weights import token_weights
from nla_megatron.types import PolicyTokens
from tests.support.sampled import made, mask_of, random_tokens

EVERY: list[dict[str, Any]] = [
    {"name": "grpo", "loss_mean": "token"},
    {"name": "grpo", "loss_mean": "constant", "loss_length": 7, "correction": "sequence_mask"},
    {"name": "gspo", "loss_mean": "sequence", "correction": "tis"},
    {"name": "cispo", "loss_mean": "token", "correction": "icepop"},
    {"name": "rloo", "loss_mean": "sequence", "entropy_coef": 0.1},
    {"name": "reinforce", "loss_mean": "constant", "loss_length": 1},
    {"name": "reinforce_pp", "kl": "k2"},
    {"name": "ppo", "kl_weighted": True, "kl": "k1"},
]


@pytest.mark.parametrize(
    ("mean", "length", "long", "short"),
    [("token", None, 1 / 4, 1 / 4), ("sequence", None, 1 / 6, 1 / 2), ("constant", 10, 1 / 20, 1 / 20)],
)
def test_the_weight_of_a_token_in_a_long_and_a_short_response(
    mean: str, length: int | None, long: float, short: float
) -> None:
    mask = mask_of([3, 1])
    expected = mask * torch.tensor([[long], [short]])
    torch.testing.assert_close(token_weights(mask, mean, length), expected)


def test_rows_without_a_response_have_no_weight_and_are_no_division_by_zero() -> None:
    for mean in ("token", "sequence", "constant"):
        assert token_weights(torch.zeros(2, 3), mean, 5).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("none", [1.0, 1.0, 1.0]),
        ("tis", [1.0, 1.5, 0.25]),  # 2 is cut to 1.5; nothing is cut from below
        ("icepop", [1.0, 0.0, 0.0]),
        ("sequence_mask", [0.5, 0.5, 0.5]),  # 1 * 2 * 1/4, which is not below 1/2
    ],
)
def test_corrections_by_hand(kind: str, expected: list[float]) -> None:
    """Ratios 1, 2 and 1/4 between bounds of 0.5 and 1.5."""
    mask = torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0]])
    old = torch.tensor([[-3.0, 1.0, 2.0, 0.25, -3.0]]).clamp(min=1e-3).log() * mask
    found = correction_weights(old, torch.zeros_like(mask), mask, kind, 0.5, 1.5)
    assert found.tolist()[0] == pytest.approx([1.0, *expected, 1.0], abs=1e-6)


def test_a_sequence_whose_product_is_out_of_bounds_is_dropped_whole() -> None:
    mask = torch.ones(2, 2)
    old = torch.tensor([[1.3, 1.3], [0.6, 1.0]]).log()
    found = correction_weights(old, torch.zeros_like(mask), mask, "sequence_mask", 0.5, 1.5)
    assert found[0].tolist() == [0.0, 0.0] and found[1].tolist() == pytest.approx([0.6, 0.6])


def picked(tokens: PolicyTokens, rows: list[int]) -> PolicyTokens:
    return replace(tokens, **{item.name: getattr(tokens, item.name)[rows] for item in fields(tokens)})


@pytest.mark.parametrize("options", EVERY, ids=lambda options: options["name"])
@given(st.lists(st.integers(1, 5), min_size=2, max_size=6), st.data())
@settings(max_examples=20, deadline=None)
def test_neither_the_split_into_microbatches_nor_their_order_changes_loss_or_gradient(
    options: dict[str, Any], lengths: list[int], data: st.DataObject
) -> None:
    algorithm, tokens = made(**options), random_tokens(lengths)
    weights = algorithm.token_weights(tokens.mask)
    whole = (algorithm.token_loss(tokens)[0] * weights).sum()
    order = data.draw(st.permutations(range(len(lengths))))
    cut = data.draw(st.integers(1, len(lengths) - 1))
    parts = sum(
        (algorithm.token_loss(picked(tokens, list(rows)))[0] * weights[list(rows)]).sum()
        for rows in (order[:cut], order[cut:])
    )
    torch.testing.assert_close(parts, whole)
    [expected], [found] = (torch.autograd.grad(loss, tokens.logprobs) for loss in (whole, parts))
    torch.testing.assert_close(found, expected)
