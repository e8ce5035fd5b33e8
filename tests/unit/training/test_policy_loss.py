"""From logits and fields to the loss of a microbatch, against the same written out in torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nla_megatron.parallel.world import World
from nla_megatron.training.policy_loss import policy_loss, policy_statistics, value_loss, value_statistics
from nla_megatron.types import Microbatch
from tests.support.sampled import made, mask_of

LENGTHS, VOCABULARY, TEMPERATURE = (4, 2, 3), 12, 0.7
NAMES = ("grpo", "gspo", "cispo", "rloo", "reinforce", "reinforce_pp", "ppo")


def part(weights: tuple[float, ...] = (1.0, 1.0, 1.0), **fields: Tensor) -> Microbatch:
    mask = mask_of(LENGTHS, first=2)
    ids = torch.randint(0, VOCABULARY, mask.shape, generator=torch.Generator().manual_seed(2))
    lengths = torch.tensor([3 + length for length in LENGTHS])
    return Microbatch(ids, lengths, torch.tensor(weights), torch.arange(3), fields={"mask": mask, **fields})


def numbers(seed: int) -> Tensor:
    """Some for every position, those that nobody should read included."""
    return torch.randn(mask_of(LENGTHS, first=2).shape, generator=torch.Generator().manual_seed(seed))


def logits() -> Tensor:
    shape = (*mask_of(LENGTHS, first=2).shape, VOCABULARY)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()


def expected_loss(values: Tensor, batch: Microbatch, bonus: float, kl_coef: float, clip: float) -> tuple[Tensor, Any]:
    """Token-mean GRPO with k3, token by token."""
    total, terms = float(batch.fields["mask"].sum()), []
    seen: dict[str, list[float]] = {"kl": [], "entropy": [], "logprob_gap": [], "clipped": []}
    for row, column in batch.fields["mask"].nonzero().tolist():
        spread = torch.log_softmax(values[row, column] / TEMPERATURE, -1)
        logprob, entropy = spread[batch.ids[row, column + 1]], -(spread.exp() * spread).sum()
        at = {name: field[row, column] for name, field in batch.fields.items()}
        ratio = (logprob - at["old"]).exp()
        bounded = ratio.clamp(1 - clip, 1 + clip)
        difference = at["reference"] - logprob
        kl = difference.exp() - difference - 1
        surrogate = -torch.minimum(ratio * at["advantages"], bounded * at["advantages"])
        terms.append(surrogate + kl_coef * kl - bonus * entropy)
        seen["kl"].append(kl.item())
        seen["entropy"].append(entropy.item())
        seen["logprob_gap"].append(abs(float(at["old"] - at["sampler"])))
        seen["clipped"].append(float(ratio.item() != bounded.item()))
    means = {name: sum(each) / total for name, each in seen.items()}
    return torch.stack(terms).sum() / total, {**means, "logprob_gap_max": max(seen["logprob_gap"])}


def test_loss_statistics_and_gradient_are_those_written_out(world: World) -> None:
    """Fields outside the mask hold numbers that nobody may read."""
    algorithm = made(kl_coef=0.2, entropy_coef=0.3, clip_low=0.2, clip_high=0.2, minibatches=2)
    mask = mask_of(LENGTHS, first=2)
    batch = part(
        token_weights=algorithm.token_weights(mask), advantages=numbers(3), sampler=numbers(4) - 3,
        old=numbers(5) - 3, reference=numbers(6) - 3,
    )  # fmt: skip
    given, again = logits(), logits()
    loss, statistics = policy_loss(algorithm, TEMPERATURE, float(mask.sum()))(given * 1, batch)
    wanted, means = expected_loss(again, batch, 0.3, 0.2, 0.2)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(loss, given)[0], torch.autograd.grad(wanted, again)[0], atol=1e-6, rtol=1e-5
    )
    found = {name: float(value) for name, value in statistics.items()}
    assert found == pytest.approx({**means, "loss": wanted.item()}, rel=1e-4, abs=1e-6)
    assert set(found) == set(policy_statistics(algorithm))


def test_numbers_outside_the_mask_cannot_spoil_a_loss(world: World) -> None:
    """exp of a log-ratio of hundreds is infinite, and infinity times a mask of 0 is no number."""
    mask = mask_of(LENGTHS, first=2)
    algorithm = made(kl_coef=0.1, kl_clamp=1e6, correction="tis", minibatches=2)
    far = torch.where(mask > 0, numbers(5) - 3, torch.tensor(-800.0))
    batch = part(
        token_weights=algorithm.token_weights(mask), advantages=mask, sampler=-far * (1 - mask) + far * mask, old=far,
        reference=-far * (1 - mask) + far * mask,
    )  # fmt: skip
    given = logits()
    loss, _ = policy_loss(algorithm, TEMPERATURE, float(mask.sum()))(given * 1, batch)
    assert loss.isfinite() and torch.autograd.grad(loss, given)[0].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_only_fill_a_microbatch_count_for_nothing(world: World, name: str) -> None:
    algorithm = made(name, kl_coef=0.1, entropy_coef=0.1, correction="sequence_mask")
    mask = mask_of(LENGTHS, first=2)
    fields = {
        "token_weights": algorithm.token_weights(mask), "advantages": numbers(3) * mask,
        "sampler": (numbers(4) - 3) * mask, "reference": (numbers(6) - 3) * mask,
    }  # fmt: skip
    whole, filled = part(**fields), part((1.0, 0.0, 1.0), **fields)
    loss_of = policy_loss(algorithm, TEMPERATURE, float(mask.sum()))
    given = logits()
    gradients = [torch.autograd.grad(loss_of(given * 1, batch)[0], given)[0] for batch in (whole, filled)]
    assert float(gradients[1][1].abs().max()) == 0
    torch.testing.assert_close(gradients[1][[0, 2]], gradients[0][[0, 2]])
    assert set(loss_of(given * 1, filled)[1]) == set(policy_statistics(algorithm))


def test_without_old_log_probs_the_present_ones_are_the_old(world: World) -> None:
    """Every ratio is 1: nothing is clipped, and the gap is between sampler and trainer."""
    algorithm, mask = made(kl_coef=0.0, clip_low=0.0, clip_high=0.0), mask_of(LENGTHS, first=2)
    batch = part(token_weights=algorithm.token_weights(mask), advantages=numbers(3) * mask, sampler=mask * 0)
    loss, statistics = policy_loss(algorithm, 1.0, float(mask.sum()))(logits(), batch)
    torch.testing.assert_close(loss, -(numbers(3) * mask).sum() / mask.sum())
    assert statistics["clipped"] == 0 and statistics["kl"] == 0
    assert statistics["logprob_gap"] > 0.5


def test_the_value_loss_is_averaged_as_the_policys(world: World) -> None:
    mask = mask_of(LENGTHS, first=2)
    algorithm = made("ppo", value_clip=0.5, loss_mean="sequence")
    weights = algorithm.token_weights(mask)
    batch = part((1.0, 1.0, 0.0), token_weights=weights, old_values=numbers(7), returns=numbers(8))
    values = numbers(9).requires_grad_()
    loss, statistics = value_loss(algorithm, float(mask.sum()))(values, batch)
    kept = mask * torch.tensor([[1.0], [1.0], [0.0]])
    bounded = torch.clamp(values, numbers(7) - 0.5, numbers(7) + 0.5)
    worse = torch.maximum((values - numbers(8)) ** 2, (bounded - numbers(8)) ** 2)
    torch.testing.assert_close(loss, (worse * weights * kept).sum() / 2)
    torch.testing.assert_close(
        statistics["value_error"], (((values - numbers(8)) ** 2) * kept).sum().detach() / mask.sum()
    )
    assert set(statistics) == set(value_statistics(algorithm)) == {"loss", "value_error", "value_clipped"}
