"""Estimates of KL(policy || reference) from one sampled token: J. Schulman, Approximating KL divergence (2020).

With d = log reference - log policy of a token that the policy drew:

    k1 = -d                  unbiased; falls below 0 as often as above
    k2 = d^2 / 2             biased; its gradient is that of the KL
    k3 = exp(d) - d - 1      unbiased, never below 0

As a *loss* k1 teaches nothing: its gradient is the score of the policy, whose expectation under the policy is 0, and
k3's is that of KL(reference || policy). Multiplied by the differentiable ratio of policy and old policy (`kl_weighted`;
DeepSeek-V3.2, 2025, section 3.1) k1 and k3 have the gradient of KL(policy || reference). In the reward, where the score
multiplies it, so has k1. A configuration with a bare k1 in the loss is refused.
"""

from __future__ import annotations

from torch import Tensor


def kl(logprobs: Tensor, reference: Tensor, estimator: str, clamp: float) -> Tensor:
    """One of k1, k2 and k3 per token, of any shape; `clamp` bounds d on both sides, so that no token explodes."""
    difference = (reference - logprobs).clamp(-clamp, clamp)
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    assert estimator == "k3", estimator
    return difference.exp() - difference - 1
