"""How responses are judged and credited: rewards of terms, and algorithms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from nla_megatron.config.options import bind
from nla_megatron.config.schema.checks import at_least, one_of, share
from nla_megatron.errors import ConfigError


@dataclass(frozen=True)
class AlgorithmConfig:
    """From rewards to advantages and losses. Formulas and sources are in the files of `nla_megatron/algorithms/`."""

    name: str = "grpo"
    baseline: str | None = None
    """What a reward is compared with. None: the algorithm's own. grpo, gspo, cispo: group or leave_one_out; reinforce:
    mean, none, ema or scst; reinforce_pp: none or group."""
    normalise_std: bool = True
    """Divide group-relative advantages by the deviation of their group."""
    advantage_epsilon: float = 1e-6
    """Added to every deviation that advantages are divided by."""
    ema_decay: float = 0.9
    """What `baseline: ema` keeps of its average in each step."""
    clip_low: float = 0.2
    """The ratio of the policy to the one before the step's first update counts as no less than 1 minus this."""
    clip_high: float = 0.2
    """The same ratio counts as no more than 1 plus this."""
    loss_mean: str = "token"
    """All tokens of a step count alike, or all responses, or (constant) a response counts as the sum of its tokens
    divided by `loss_length`."""
    loss_length: int | None = None
    """Tokens that `loss_mean: constant` divides by, usually the longest that a response may be."""
    kl: str = "k3"
    """Which estimate of the KL from one token (`nla_megatron/algorithms/kl.py`)."""
    kl_in: str = "loss"
    """In the reward, each token's KL is taken off before anything is compared."""
    kl_weighted: bool = False
    """Multiply the KL in the loss by the token's ratio to the old policy: then k1 and k3 have the KL's own gradient."""
    kl_coef: float = 0.01
    """Weight of the KL to the reference; 0 keeps no reference."""
    kl_clamp: float = 12.0
    """Bound on the log-ratio inside the estimate: one outlier token cannot dominate a step."""
    reference: str = "initial"
    """The policy that the KL is measured to: the one this stage starts from, or a moving average of its weights."""
    reference_decay: float = 0.99
    """What `reference: ema` keeps of its weights in each step."""
    entropy_coef: float = 0.0
    """Weight of the bonus for the entropy of each token's distribution."""
    correction: str | None = None
    """Importance correction of the sampler's numerical difference from the trainer
    (`nla_megatron/algorithms/correction.py`). None: tis where the sampler has a LoRA policy merged into weights of 16
    bits, which lose a part of it; else none."""
    correction_low: float = 0.5
    """icepop and sequence_mask drop what is under this many times as likely to the trainer as to the sampler."""
    correction_high: float = 2.0
    """icepop and sequence_mask drop what is over this many times as likely; tis bounds its weight by it."""
    epochs: int = 1
    """Passes over a step's rollouts."""
    minibatches: int = 1
    """Optimizer steps per pass; above 1 in all, the clipped ratio starts to matter."""
    dynamic_sampling: int = 0
    """How often in a step prompts whose samples all have one reward are replaced by others; 0 keeps them."""
    gamma: float = 1.0
    """Discount per token, where rewards are followed along a response (ppo, reinforce_pp)."""
    gae_lambda: float = 1.0
    """1: advantages from whole returns; 0: from one token and the critic's next value (ppo)."""
    value_clip: float | None = 0.2
    """How far a critic's value may move from its old one before its loss stops falling (ppo); None is no bound."""
    whiten: bool = True
    """Standardise advantages over all tokens of a step (ppo)."""
    options: dict[str, Any] = field(default_factory=dict)
    """What an algorithm of your own takes beside these."""

    def __post_init__(self) -> None:
        one_of("algorithm.loss_mean", self.loss_mean, ("token", "sequence", "constant"))
        one_of("algorithm.kl", self.kl, ("k1", "k2", "k3"))
        one_of("algorithm.kl_in", self.kl_in, ("loss", "reward"))
        one_of("algorithm.reference", self.reference, ("initial", "ema"))
        if self.correction is not None:
            one_of("algorithm.correction", self.correction, ("none", "tis", "icepop", "sequence_mask"))
        for key in ("epochs", "minibatches"):
            at_least(f"algorithm.{key}", getattr(self, key), 1)
        positive = ("kl_coef", "kl_clamp", "entropy_coef", "clip_low", "clip_high", "correction_low", "correction_high")
        for key in (*positive, "advantage_epsilon", "dynamic_sampling"):
            at_least(f"algorithm.{key}", getattr(self, key), 0.0)
        for key in ("ema_decay", "reference_decay", "gamma", "gae_lambda"):
            share(f"algorithm.{key}", getattr(self, key))
        for key in ("loss_length", "value_clip"):
            if getattr(self, key) is not None:
                at_least(f"algorithm.{key}", getattr(self, key), 1 if key == "loss_length" else 0.0)
        self._check_together()

    def _check_together(self) -> None:
        if self.loss_mean == "constant" and self.loss_length is None:
            raise ConfigError(
                "algorithm.loss_mean=constant without algorithm.loss_length", "tokens to divide by",
                "set algorithm.loss_length=, for example to rollout.max_new_tokens",
            )  # fmt: skip
        if self.kl_weighted and self.kl_in == "reward":
            raise ConfigError(
                "algorithm.kl_weighted=true with algorithm.kl_in=reward", "a weight for the KL in the loss only",
                "drop algorithm.kl_weighted=, or set algorithm.kl_in=loss",
            )  # fmt: skip
        if self.kl == "k1" and self.kl_in == "loss" and self.kl_coef > 0 and not self.kl_weighted:
            raise ConfigError(
                "algorithm.kl=k1 in the loss", "k2 or k3 in the loss, or k1 in the reward",
                "set algorithm.kl_in=reward, algorithm.kl=k3 or algorithm.kl_weighted=true: the expected gradient of k1"
                " is zero",
            )  # fmt: skip
        if self.correction_low > self.correction_high:
            raise ConfigError(
                f"algorithm.correction_low={self.correction_low} above correction_high={self.correction_high}",
                "a lower bound below the upper one", "exchange them",
            )  # fmt: skip
        if self.reference == "ema" and self.kl_coef == 0:
            raise ConfigError(
                "algorithm.reference=ema with algorithm.kl_coef=0", "a KL that is measured to the reference",
                "set algorithm.kl_coef=, or drop algorithm.reference=",
            )  # fmt: skip


@dataclass(frozen=True)
class RewardTermConfig:
    """One term of a reward: what it is, and what it counts for. Its weight may change once, at a step or an epoch."""

    term: str = ""
    """A registered term, or the import path `package.module:Name` of a class or a function. Empty: as its label."""
    weight: float = 1.0
    """Of the term in the reward."""
    later_weight: float | None = None
    """The weight from `change_at` on. None: it stays."""
    change_at: int | None = None
    """The first step or epoch, 0-based, that has `later_weight`."""
    change_by: str = "step"
    """Whether `change_at` counts steps or passes over the table."""
    options: dict[str, Any] = field(default_factory=dict)
    """The term's own."""

    def __post_init__(self) -> None:
        one_of("change_by", self.change_by, ("step", "epoch"))
        if (self.later_weight is None) != (self.change_at is None):
            raise ConfigError(
                f"later_weight={self.later_weight} with change_at={self.change_at}", "both or neither", "add the other"
            )
        if self.change_at is not None:
            at_least("change_at", self.change_at, 0)

    @property
    def changes(self) -> bool:
        """Whether the weight does."""
        return self.change_at is not None


@dataclass(frozen=True)
class RewardConfig:
    """Which terms a reward has, and how they become one number (docs/rewards.md)."""

    terms: dict[str, Any] = field(default_factory=dict)
    """By label, each a RewardTermConfig; the labels `correctness`, `length` and `format` have a role below."""
    composition: str = "additive"
    """`additive`: the weighted sum. `weighted_length_penalty`: the length counts only where the answer is right."""
    product: str = "correctness_length"
    """What the length is multiplied by in `weighted_length_penalty`: correctness, or correctness and format."""
    strict_format_gate: bool = False
    """A response whose term `format` is 0 gets `non_strict_penalty` in the place of everything else."""
    non_strict_penalty: float = -1.0

    def __post_init__(self) -> None:
        one_of("reward.composition", self.composition, ("additive", "weighted_length_penalty"))
        one_of("reward.product", self.product, ("correctness_length", "correctness_length_format"))
        if not math.isfinite(self.non_strict_penalty):
            raise ConfigError(f"reward.non_strict_penalty={self.non_strict_penalty}", "a finite number", "correct it")
        _ = self.parts  # so that a term's mistakes are named when the configuration is composed

    @cached_property
    def parts(self) -> dict[str, RewardTermConfig]:
        """The terms by label. Raises ConfigError for an unknown key or a wrong type."""
        for label, one in self.terms.items():
            if not isinstance(one, Mapping):
                raise ConfigError(
                    f"reward.terms.{label}={one!r}", "the keys of a term", f"set reward.terms.{label}.weight or .term"
                )
        return {label: bind(RewardTermConfig, one, f"reward.terms.{label}") for label, one in self.terms.items()}
