"""Algorithms write numbers: rewards become advantages, log-probs per-token losses. The trainer knows no names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from torch import Tensor

from nla_megatron.config.options import is_import_path, resolve
from nla_megatron.config.registry import Registry
from nla_megatron.config.schema import AlgorithmConfig
from nla_megatron.config.unread import Unread
from nla_megatron.errors import ConfigError
from nla_megatron.types import Credit, Needs, PolicyTokens, Sampled


class Algorithm(Protocol):
    """What the training loop asks of an algorithm. Legend: N rollouts of a step, B rows of a microbatch, T tokens.

    A step is: `credit` once; for every minibatch of every epoch `token_weights` over its rows, and per microbatch the
    loss `(token_loss * token_weights).sum()`; with `needs.values` also `value_loss` under the same weights.
    """

    needs: Needs
    least_samples: int
    """Samples of a prompt below which there is nothing to compare; see `check_algorithm`."""
    own_keys: tuple[str, ...] | None
    """Keys of `AlgorithmConfig` that it reads and not every algorithm does; None is not said. See `unread`."""

    def credit(self, sampled: Sampled) -> Credit:
        """Advantages per token from a step's rewards."""

    def token_weights(self, mask_NT: Tensor) -> Tensor:
        """How much each token counts in the loss of one optimizer step, (N, T); how losses are averaged."""

    def token_loss(self, tokens: PolicyTokens) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss per token (B, T) with gradient, and statistics per token (B, T), which are averaged over tokens."""

    def value_loss(self, values_BT: Tensor, old_BT: Tensor, returns_BT: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The critic's loss per token and statistics, where `needs.values`."""

    def uninformative(self, rewards_N: Tensor, groups_N: Tensor) -> Tensor:
        """(N,) bool: rollouts of prompts to be replaced by other prompts' (dynamic sampling); all False where none."""

    def state(self) -> dict[str, float]:
        """What must survive a resume, such as a moving average of rewards; numbers alone."""

    def load_state(self, state: dict[str, float]) -> None: ...


_ALGORITHMS: Registry[Callable[[AlgorithmConfig], Algorithm]] = Registry("algorithm")
register = _ALGORITHMS.register
"""A decorator that makes an algorithm known by name."""


def make_algorithm(config: AlgorithmConfig) -> Algorithm:
    """The algorithm of that name, or of the class that `package.module:Class` names.

    Raises:
        ConfigError: an unknown name, a class that cannot be imported, or options that this algorithm does not have.
    """
    # Each registers itself.
    from nla_megatron.algorithms import cispo, grpo, gspo, ppo, reinforce, reinforce_pp, rloo  # noqa: F401

    if is_import_path(config.name):
        found = resolve(config.name, "algorithm.name")
        if not hasattr(found, "credit"):
            raise ConfigError(
                f"algorithm.name={config.name!r}, which is {found!r:.80}", "a class with the methods of `Algorithm`",
                "correct algorithm.name=",
            )  # fmt: skip
        made: Algorithm = found(config)
        return made
    if config.name not in _ALGORITHMS:
        raise ConfigError(
            f"algorithm.name={config.name!r}", f"one of {', '.join(sorted(_ALGORITHMS))}, or package.module:Class",
            "set algorithm.name=",
        )  # fmt: skip
    return _ALGORITHMS[config.name](config)


def check_algorithm(config: AlgorithmConfig, samples_per_prompt: int) -> None:
    """Whether the algorithm can work on groups of this size; before a run.

    Raises:
        ConfigError: as `make_algorithm`; a group too small for what is compared within it.
    """
    least = make_algorithm(config).least_samples
    if samples_per_prompt < least:
        raise ConfigError(
            f"samples_per_prompt={samples_per_prompt} with algorithm.name={config.name}", f"at least {least}",
            "raise samples_per_prompt: a group of one has no relative advantage; or choose algorithm=reinforce_mean",
        )  # fmt: skip
    if config.dynamic_sampling and samples_per_prompt < 2:
        raise ConfigError(
            f"algorithm.dynamic_sampling={config.dynamic_sampling} with samples_per_prompt={samples_per_prompt}",
            "samples_per_prompt of at least 2", "drop dynamic sampling: a group of one always has equal rewards",
        )  # fmt: skip


def unread(config: AlgorithmConfig, correction: str = "none") -> Iterator[Unread]:
    """What the algorithm, as it is configured, does not read. Of one from elsewhere that is not known.

    Args:
        correction: what it may be where the configuration leaves it open.
    """
    if is_import_path(config.name):
        return
    own = getattr(make_algorithm(config), "own_keys", None)
    others = dict.fromkeys(key for each in _ALGORITHMS.values() for key in getattr(each, "own_keys", None) or ())
    idle: list[tuple[bool, str, Iterable[str]]] = [
        (own is not None, f"with algorithm.name={config.name}", [key for key in others if key not in (own or ())]),
        (config.loss_mean != "constant", f"with algorithm.loss_mean={config.loss_mean}", ["loss_length"]),
        (config.reference != "ema", f"with algorithm.reference={config.reference}", ["reference_decay"]),
        (
            (config.correction or correction) == "none",
            "with algorithm.correction=none",
            ["correction_low", "correction_high"],
        ),
        (config.kl_coef == 0, "with algorithm.kl_coef=0", ["kl", "kl_in", "kl_weighted", "kl_clamp"]),
    ]
    yield from ((f"algorithm.{key}", when) for holds, when, keys in idle if holds for key in keys)
