"""A steered policy in one process: log-probs and the predictor's gradient against transformers, hooks and autograd."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nla_megatron.models.logprobs import response_logprobs
from nla_megatron.parallel.world import World
from nla_megatron.training.losses import cross_entropy
from tests.support import strengths as by_hand
from tests.support.strengths import CASES, LENGTHS, PROMPTS, STEP


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return by_hand.prepare(tmp_path_factory.mktemp("strengths"))


@pytest.fixture(scope="module")
def reference(files: tuple[Path, Path]) -> by_hand.ByHand:
    return by_hand.ByHand(*files)


@pytest.mark.parametrize("case", CASES)
def test_logprobs_and_the_predictors_gradient_equal_a_hooked_transformers_model(
    case: str, world: World, files: tuple[Path, Path], reference: by_hand.ByHand
) -> None:
    policy = by_hand.policy_of(case, *files, world)
    batch = by_hand.batch()
    before = by_hand.checksum(policy)
    wanted = reference.run(case, policy.predictor.state_dict(), by_hand.masks_of(policy))
    logprobs = policy.rows(batch, response_logprobs(1.0), max(LENGTHS))
    done = policy.update(batch, cross_entropy(float(batch.fields["mask"].sum())), ("loss",), 0)
    prompts = [tuple(row[:prompt]) for row, prompt in zip(batch.ids, PROMPTS, strict=True)]
    assert torch.allclose(policy.features(prompts), wanted.features, rtol=1e-5, atol=1e-5)
    assert torch.allclose(policy.strengths(prompts, STEP), wanted.strengths, rtol=1e-5, atol=1e-6)
    for row, each in enumerate(wanted.logprobs):
        assert torch.allclose(logprobs[row, PROMPTS[row] - 1 : LENGTHS[row] - 1], each, atol=2e-5)
    assert done.statistics["loss"] == pytest.approx(wanted.loss, rel=1e-5)
    gradients = {name: each.grad for name, each in policy.predictor.named_parameters() if each.grad is not None}
    assert by_hand.gradient_gap(gradients, wanted.gradients) <= 1e-5
    assert by_hand.checksum(policy) == before
    assert all(each.grad is None for chunk in policy.chunks for each in chunk.parameters())
