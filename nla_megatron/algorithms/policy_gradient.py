"""What most algorithms share: a clipped surrogate, a KL, an entropy bonus, a correction, put together once.

    loss_t = correction_t * surrogate_t + kl_coef * KL_t - entropy_coef * H_t

An algorithm that is more or less of this inherits it and says what differs, usually `credit` alone.
Legend: N rollouts of a step, B rows of a microbatch, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nla_megatron.algorithms import weights
from nla_megatron.algorithms.advantages import flat
from nla_megatron.algorithms.correction import correction_weights
from nla_megatron.algorithms.kl import kl
from nla_megatron.algorithms.surrogates import clipped, token_log_ratio
from nla_megatron.config.schema import AlgorithmConfig
from nla_megatron.errors import ConfigError
from nla_megatron.types import Credit, Needs, PolicyTokens, Sampled


class PolicyGradient:
    """Everything but `credit`, as the configuration says it."""

    baselines: tuple[str, ...] = ()
    """What `algorithm.baseline` may be, the default first."""
    least_samples = 1
    """Samples of a prompt below which the algorithm has nothing to compare."""
    options: tuple[str, ...] = ()
    """Keys of `algorithm.options` that it reads."""
    own_keys: tuple[str, ...] | None = None
    """Keys of `AlgorithmConfig` that it reads and not every algorithm does; None is not said, and none is refused."""

    def __init__(self, config: AlgorithmConfig):
        if config.baseline is not None and config.baseline not in self.baselines:
            raise ConfigError(
                f"algorithm.baseline={config.baseline!r} with algorithm.name={config.name}",
                f"one of {', '.join(self.baselines)}" if self.baselines else "none: its baseline is not chosen",
                "drop algorithm.baseline=, or choose another algorithm=",
            )
        if unknown := sorted(set(config.options) - set(self.options)):
            raise ConfigError(
                f"algorithm.options.{unknown[0]} with algorithm.name={config.name}",
                f"one of {', '.join(self.options)}" if self.options else "no options", f"drop {unknown[0]}",
            )  # fmt: skip
        self.config = config
        self.baseline = config.baseline or next(iter(self.baselines), "")
        self.needs = self.wanted()

    def wanted(self) -> Needs:
        """What the configuration's parts need; an algorithm that needs more adds it."""
        config = self.config
        with_kl = config.kl_coef > 0
        return Needs(
            # One update is made with the policy that sampled: its own log-probs are the old ones.
            old=config.epochs * config.minibatches > 1 or (with_kl and config.kl_in == "reward"),
            reference=with_kl,
            entropy=config.entropy_coef > 0,
        )

    def credit(self, sampled: Sampled) -> Credit:
        raise NotImplementedError(f"{type(self).__name__} says nothing of advantages")

    def surrogate(self, tokens: PolicyTokens) -> tuple[Tensor, Tensor]:
        """The policy's loss (B, T), and where its ratio lay outside the bounds, (B, T)."""
        return clipped(token_log_ratio(tokens), tokens.advantages, self.config.clip_low, self.config.clip_high)

    def token_weights(self, mask_NT: Tensor) -> Tensor:
        return weights.token_weights(mask_NT, self.config.loss_mean, self.config.loss_length)

    def token_loss(self, tokens: PolicyTokens) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        loss_BT, clipped_BT = self.surrogate(tokens)
        statistics = {"clipped": clipped_BT}
        if config.correction not in (None, "none"):
            corrected_BT = correction_weights(
                tokens.old, tokens.sampler, tokens.mask, config.correction, config.correction_low,
                config.correction_high,
            )  # fmt: skip
            loss_BT = corrected_BT * loss_BT
            statistics["correction"] = corrected_BT
            statistics["correction_zero"] = (corrected_BT == 0).float()
        if tokens.reference is not None:
            kl_BT = kl(tokens.logprobs, tokens.reference, config.kl, config.kl_clamp)
            statistics["kl"] = kl_BT.detach()
            if config.kl_in == "loss":
                weight_BT = token_log_ratio(tokens).exp() if config.kl_weighted else 1.0
                loss_BT = loss_BT + config.kl_coef * weight_BT * kl_BT
        if config.entropy_coef > 0:
            assert tokens.entropy is not None
            loss_BT = loss_BT - config.entropy_coef * tokens.entropy
        return loss_BT, statistics

    def value_loss(self, values_BT: Tensor, old_BT: Tensor, returns_BT: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        raise NotImplementedError(f"{type(self).__name__} has no critic")

    def uninformative(self, rewards_N: Tensor, groups_N: Tensor) -> Tensor:
        """Groups of equal rewards, where dynamic sampling is on (DAPO, Yu et al. 2025, equation 11)."""
        if self.config.dynamic_sampling == 0:
            return torch.zeros_like(groups_N, dtype=torch.bool)
        return flat(rewards_N, groups_N)

    def state(self) -> dict[str, float]:
        return {}

    def load_state(self, state: dict[str, float]) -> None:
        assert not state, f"{type(self).__name__} keeps no state, got {sorted(state)}"
