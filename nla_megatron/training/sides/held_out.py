"""What the sides of text tasks share: what responses to held-out rows are worth."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from nla_megatron.config.schema import RlConfig
from nla_megatron.parallel.collectives import by_rank_0
from nla_megatron.parallel.world import World
from nla_megatron.rewards import Term, make_reward
from nla_megatron.types import Measured


def terms_of_training_rows(config: RlConfig) -> list[str]:
    """The labels of the reward's terms that know something of the training rows alone."""
    terms = make_reward(config.reward, 1.0).terms
    return [label for label, term in terms.items() if type(term).check_rows is not Term.check_rows]


def held_out_rewards(config: RlConfig, n_rows: int, world: World) -> Callable[[Measured, int], Tensor] | None:
    """Rewards (N,) of responses to held-out rows at a step of the training on `n_rows` rows; collective.

    Returns:
        None where a term knows the training rows alone. Each call makes a reward of its own: a moving average of the
        training rewards is no part of an evaluation.
    """
    if terms_of_training_rows(config):
        return None

    def rewards(measured: Measured, step: int) -> Tensor:
        reward = make_reward(config.reward, n_rows / config.batch_size, once=partial(by_rank_0, world=world))
        return reward(measured, step).rewards

    return rewards
