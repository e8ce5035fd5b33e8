"""REINFORCE: the score of a response times how much better than a baseline it was.

    A_i = r_i - b,   loss_t = -stop_gradient(ratio_t) A_i log policy_t

Williams, Simple statistical gradient-following algorithms (1992). The ratio is 1 in a step's first update and weighs
later ones (`epochs`, `minibatches`) by importance, without clipping. `baseline` is one of

    mean   the mean reward of the step
    none   b = 0
    ema    a moving average of the steps before: b <- ema_decay * b + (1 - ema_decay) * mean reward of the step; the
           first step, which has none before it, takes its own mean
    scst   the reward of the prompt's greedy response: Rennie et al., Self-critical sequence training (2017)

None of them needs more than one sample of a prompt.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nla_megatron.algorithms import register
from nla_megatron.algorithms.advantages import check_finite, to_tokens
from nla_megatron.algorithms.policy_gradient import PolicyGradient
from nla_megatron.algorithms.returns import token_rewards
from nla_megatron.algorithms.surrogates import weighted_score
from nla_megatron.types import Credit, Needs, PolicyTokens, Sampled

_UNBOUNDED = float("inf")


@register("reinforce")
class Reinforce(PolicyGradient):
    """A baseline of the whole step, of the steps before, or of each prompt's greedy response."""

    baselines = ("mean", "none", "ema", "scst")
    own_keys = ("ema_decay",)
    average: float | None = None
    """Of the steps so far, for `ema`."""

    def wanted(self) -> Needs:
        return replace(super().wanted(), greedy=self.baseline == "scst")

    def credit(self, sampled: Sampled) -> Credit:
        check_finite(sampled.rewards)
        rewards_NT, statistics = token_rewards(sampled, self.config)
        rewards_N = rewards_NT.sum(1)
        baseline_N = self._baseline(rewards_N, sampled)
        statistics["baseline"] = float(baseline_N.mean())
        return Credit(to_tokens(rewards_N - baseline_N, sampled.mask), statistics=statistics)

    def _baseline(self, rewards_N: Tensor, sampled: Sampled) -> Tensor:
        """(N,) fp64."""
        if self.baseline == "none":
            return torch.zeros_like(rewards_N)
        if self.baseline == "scst":
            assert sampled.greedy is not None
            check_finite(sampled.greedy)
            return sampled.greedy.double()
        mean = float(rewards_N.mean())
        if self.baseline == "mean":
            return torch.full_like(rewards_N, mean)
        before = mean if self.average is None else self.average
        self.average = self.config.ema_decay * before + (1 - self.config.ema_decay) * mean
        return torch.full_like(rewards_N, before)

    def surrogate(self, tokens: PolicyTokens) -> tuple[Tensor, Tensor]:
        return weighted_score(tokens, low=1.0, high=_UNBOUNDED)

    def state(self) -> dict[str, float]:
        return {} if self.average is None else {"average": self.average}

    def load_state(self, state: dict[str, float]) -> None:
        self.average = state.get("average")
