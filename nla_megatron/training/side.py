"""What `rl` asks of a task's side: prompts, measurements, the model that learns, and whatever learns beside it.

A side is made from the configuration of `rl` and found by the task's name; the loop in `rl.py` knows no other name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from nla_megatron.config.schema import RlConfig
from nla_megatron.interventions.checks import Marker
from nla_megatron.interventions.spec import Intervention
from nla_megatron.models.batching import Batch
from nla_megatron.models.pipeline import Collect, Loss
from nla_megatron.parallel.world import World
from nla_megatron.rollout.requests import PromptRequest, Vectors
from nla_megatron.types import Measured, ModelShape, Rollout, RolloutBatch


class Learner(Protocol):
    """Something with weights that an update changes: `TrainModule`, or what has its methods."""

    def update(
        self, batch: Batch, loss: Loss, names: tuple[str, ...], step: int,
        check: Callable[[dict[str, float]], None] | None = None,
    ) -> Any: ...  # fmt: skip

    def rows(self, batch: Batch, collect: Collect, width: int | None = None) -> Tensor: ...

    def state(self, loading: bool) -> dict[str, Any]: ...

    def load_state(self, loaded: dict[str, Any]) -> None: ...


class Side(Protocol):
    """One task in `rl`. Every method is collective."""

    directory: str
    """Hugging Face directory of the policy, which the sampler starts from."""
    shape: ModelShape
    rows: int
    """Prompts to draw from."""
    tokenizer: Any
    interventions: tuple[Intervention, ...]
    marker: Marker | None
    vectors: Vectors
    """What the engine's interventions take, by row."""
    policy: Learner
    """What the algorithm's loss trains."""
    model: Any
    """The Megatron model whose weights the sampler must have; None where they never change."""
    learners: Mapping[str, Learner]
    """Everything that a checkpoint holds, by name; the policy is one of them."""

    def reference(self) -> AbstractContextManager[None]:
        """Inside, `policy.rows` computes with the policy that this stage started from."""

    def requests(self, rows: Sequence[int], step: int) -> list[PromptRequest]:
        """One prompt per row; groups are numbered from 0."""

    def batch(self, rollouts: Sequence[Rollout], step: int, fields: Mapping[str, Tensor]) -> Batch:
        """Sequences of the policy with the field `mask` (see `models.batching.response_mask`) and `fields`."""

    def measure(self, rollouts: RolloutBatch, step: int) -> Measured:
        """What the reward is made of; models that learn do so after it."""

    def learn(self, rollouts: RolloutBatch, measured: Measured, step: int) -> dict[str, float]:
        """Updates of what learns beside the policy; returns what to log."""

    def evaluate(self, engine: Any, step: int) -> dict[str, float]:
        """Numbers on held-out rows with the models as they are now; empty where there are none."""

    def export(self) -> None:
        """Write what was trained as Hugging Face directories."""


MakeSide = Callable[[RlConfig, World], Side]
