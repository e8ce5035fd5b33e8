"""Log-probs, entropies and their gradients under a temperature, also where rows pad the vocabulary."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nla_megatron.models.logprobs import token_entropy, token_logprobs
from nla_megatron.parallel.world import World


def logits_and_padded() -> tuple[Tensor, Tensor]:
    logits = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(0)) * 3
    padded = torch.cat([logits, torch.full((2, 3, 6), torch.finfo(torch.float32).min)], dim=-1)
    return logits.requires_grad_(), padded.requires_grad_()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_rows_that_pad_the_vocabulary_change_neither_an_entropy_nor_its_gradient(
    world: World, temperature: float
) -> None:
    logits, padded = logits_and_padded()
    weights = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]])
    expected = torch.distributions.Categorical(logits=logits / temperature).entropy()
    found = token_entropy(padded, temperature)
    torch.testing.assert_close(found, expected)
    [wanted], [gradient] = (
        torch.autograd.grad((weights * entropy).sum(), values)
        for entropy, values in ((expected, logits), (found, padded))
    )
    torch.testing.assert_close(gradient[..., :10], wanted, atol=1e-6, rtol=1e-5)
    assert float(gradient[..., 10:].abs().max()) == 0


def test_an_entropys_gradient_survives_log_probs_that_consume_the_logits(world: World) -> None:
    """Megatron's cross-entropy works in place; both are computed from the same logits in the policy's loss."""
    logits, _ = logits_and_padded()
    targets = torch.tensor([[1, 2, 3], [4, 5, 6]])
    spread = torch.log_softmax(logits, -1)
    expected = (-(spread.exp() * spread).sum(-1) + spread.gather(-1, targets[..., None])[..., 0]).sum()
    shared = logits.clone()
    found = (token_entropy(shared) + token_logprobs(shared, targets)).sum()
    torch.testing.assert_close(found, expected)
    [wanted], [gradient] = torch.autograd.grad(expected, logits), torch.autograd.grad(found, logits)
    torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-5)


def test_the_gradient_of_bf16_logits_is_bf16(world: World) -> None:
    logits = torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    entropy = token_entropy(logits)
    [gradient] = torch.autograd.grad(entropy.sum(), logits)
    assert entropy.dtype == torch.float32 and gradient.dtype == torch.bfloat16


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 1.3])
def test_a_temperature_rounds_nothing_that_the_model_has_computed(world: World, temperature: float) -> None:
    """bf16 logits are divided in fp32: against fp64 what is left is the rounding of fp32, not of bf16."""
    logits = (torch.randn(4, 50, 300, generator=torch.Generator().manual_seed(2)) * 6).bfloat16()
    targets = torch.randint(0, 300, (4, 50), generator=torch.Generator().manual_seed(3))
    exact = torch.log_softmax(logits.double() / temperature, dim=-1)
    shared = logits.clone().requires_grad_()
    found, entropy = token_logprobs(shared, targets, temperature), token_entropy(logits, temperature)
    assert float((found.detach().double() - exact.gather(-1, targets[..., None])[..., 0]).abs().max()) < 1e-4
    assert float((entropy.double() + (exact.exp() * exact).sum(-1)).abs().max()) < 1e-4
    [gradient] = torch.autograd.grad(found.sum(), shared)
    wanted = (torch.nn.functional.one_hot(targets, 300) - exact.exp()) / temperature
    # It is rounded once, as it enters the model, and never before.
    torch.testing.assert_close(gradient, wanted.bfloat16(), atol=1e-6, rtol=2**-7)
    assert torch.equal(shared, logits)
