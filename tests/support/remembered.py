"""A reward of a user's own that is often the same for a whole group, and that remembers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nla_megatron.rewards import Term
from nla_megatron.types import Measured

DECAY = 0.75


def coarse(text: str) -> float:
    """Whether a text's length is a multiple of three: nothing a model could aim at, and seldom alike by chance."""
    return float(len(text) % 3 == 0)


class Remembered(Term):
    """`coarse` less a moving average of the steps before."""

    def __init__(self, options: Any):
        super().__init__(options)
        self.average = 0.0

    def __call__(self, measured: Measured) -> Tensor:
        return torch.tensor([coarse(rollout.text) for rollout in measured.rollouts])

    def among(self, rewards_N: Tensor, step_M: Tensor) -> Tensor:
        return rewards_N - self.average

    def settle(self, step_M: Tensor) -> None:
        self.average = DECAY * self.average + (1 - DECAY) * float(step_M.double().mean())

    def state(self) -> dict[str, float]:
        return {"average": self.average}

    def load_state(self, state: dict[str, float]) -> None:
        self.average = state["average"]
