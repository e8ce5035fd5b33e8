"""PPO's advantages, returns and value loss by hand."""

from __future__ import annotations

import math

import pytest
import torch

from tests.support.sampled import made, sampled


def test_advantages_and_returns_by_hand() -> None:
    """gamma 1, lambda 0.5, KL k1 of 1 and 2 at 0.5. Row 0: rewards -0.5 and 4 - 1 = 3, values 1 and 2.

    d = -0.5 + 2 - 1 = 0.5, 3 - 2 = 1; A = 0.5 + 0.5 * 1 = 1, 1; returns 2, 3. Row 1: d = 1 - 4 = -3; return 1.
    """
    batch = sampled(
        [4.0, 1.0], [0, 1], [2, 1], values=[[1.0, 2.0], [4.0]],
        old=[[-1.0, -1.0], [-1.0]], reference=[[-2.0, -3.0], [-1.0]],
    )  # fmt: skip
    options = {"gae_lambda": 0.5, "kl": "k1", "kl_in": "reward", "kl_coef": 0.5}
    credit = made("ppo", whiten=False, **options).credit(batch)
    assert credit.advantages.tolist() == [[0.0, 1.0, 1.0, 0.0], [0.0, -3.0, 0.0, 0.0]]
    assert credit.returns is not None
    assert credit.returns.tolist() == [[0.0, 2.0, 3.0, 0.0], [0.0, 1.0, 0.0, 0.0]]
    # Whitened over the three tokens: mean -1/3, squares 16/9 + 16/9 + 64/9 = 96/9, deviation √(48/9).
    white = made("ppo", advantage_epsilon=0.0, **options).credit(batch)
    deviation = math.sqrt(48 / 9)
    expected = [[0.0, 4 / 3 / deviation, 4 / 3 / deviation, 0.0], [0.0, -8 / 3 / deviation, 0.0, 0.0]]
    torch.testing.assert_close(white.advantages, torch.tensor(expected))
    assert white.returns is not None and torch.equal(white.returns, credit.returns)
    assert credit.statistics["value"] == pytest.approx(7 / 3)
    # Errors 1, 1, -3 around -1/3: variance 32/9; returns 2, 3, 1: variance 2/3.
    assert credit.statistics["explained_variance"] == pytest.approx(1 - (32 / 9) / (2 / 3))


@pytest.mark.parametrize(
    ("value", "old", "target", "clip", "loss", "gradient", "clipped"),
    [
        (1.5, 1.0, 3.0, None, 1.125, -1.5, 0.0),  # (1.5 - 3)^2 / 2
        (1.1, 1.0, 3.0, 0.2, 1.805, -1.9, 0.0),  # within the bound
        (1.5, 1.0, 3.0, 0.2, 1.62, 0.0, 1.0),  # far enough towards the target: as if at 1.2, and no further push
        (0.5, 1.0, 3.0, 0.2, 3.125, -2.5, 0.0),  # moved away: pushed back in full
    ],
)
def test_the_clipped_value_loss_by_hand(
    value: float, old: float, target: float, clip: float | None, loss: float, gradient: float, clipped: float
) -> None:
    values = torch.tensor([[value]], requires_grad=True)
    found, statistics = made("ppo", value_clip=clip).value_loss(values, torch.tensor([[old]]), torch.tensor([[target]]))
    [slope] = torch.autograd.grad(found.sum(), values)
    assert (found.item(), slope.item()) == pytest.approx((loss, gradient), abs=1e-6)
    assert statistics["value_error"].item() == pytest.approx((value - target) ** 2, abs=1e-6)
    assert ("value_clipped" in statistics) == (clip is not None)
    assert clip is None or statistics["value_clipped"].item() == clipped


def test_a_perfect_critic_leaves_no_advantage() -> None:
    batch = sampled([2.0, -1.0], [0, 0], [3, 2], values=[[2.0] * 3, [-1.0] * 2])
    credit = made("ppo", whiten=False, kl_coef=0.0).credit(batch)
    assert float(credit.advantages.abs().max()) == 0
    assert credit.statistics["explained_variance"] == 1.0


def test_advantages_of_equal_returns_are_whitened_without_dividing_by_zero() -> None:
    batch = sampled([1.0, 1.0], [0, 0], [1, 1], values=[[0.0], [0.0]])
    credit = made("ppo", kl_coef=0.0).credit(batch)
    assert float(credit.advantages.abs().max()) == 0 and credit.statistics["explained_variance"] == 0.0
