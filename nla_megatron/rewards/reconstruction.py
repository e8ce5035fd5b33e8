"""The NLA reward: how well the AR rebuilds the activation from the text (docs/method.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from nla_megatron import geometry
from nla_megatron.config.schema import RewardConfig
from nla_megatron.rewards import register


@register("reconstruction")
class Reconstruction:
    """The transformed error; a response without an explanation gets what an orthogonal prediction would."""

    def __init__(self, config: RewardConfig):
        self.config = config

    def __call__(self, mse_N: Tensor, failed_N: Tensor) -> Tensor:
        rewards = geometry.reward(mse_N, self.config.transform, self.config.temperature)
        failed = geometry.failed_reward(self.config.transform, self.config.temperature)
        return torch.where(failed_N, torch.full_like(rewards, failed), rewards)
