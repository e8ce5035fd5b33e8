"""What `rl` asks of a task's side: prompts, measurements, the policy, and whatever learns beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from nla_megatron.config.schema import RlConfig
from nla_megatron.contract.tokenizer import ModelTokenizer
from nla_megatron.interventions.checks import Marker
from nla_megatron.interventions.spec import Intervention
from nla_megatron.models.batching import Batch
from nla_megatron.models.pipeline import Collect, Loss
from nla_megatron.parallel.world import World
from nla_megatron.rollout.requests import PromptRequest, Vectors
from nla_megatron.training.checkpoint import Stateful
from nla_megatron.training.module import Update
from nla_megatron.training.reference import Reference
from nla_megatron.training.sampler import Sampler
from nla_megatron.types import Measured, ModelShape, Rollout, RolloutBatch


@dataclass(frozen=True)
class Prompts:
    """What there is to draw from: how many rows, the longest of their prompts in tokens, and what is measured."""

    rows: int
    longest: int
    values: tuple[str, ...]
    """Names of `Measured.values`."""


class Policy(Stateful, Protocol):
    """What the algorithm's loss trains: `TrainModule`, or what has its methods."""

    chunks: list[Any]
    """Of the model that writes, on this rank."""

    def update(
        self, batch: Batch, loss: Loss, names: tuple[str, ...], step: int,
        check: Callable[[dict[str, float]], None] | None = None,
    ) -> Update: ...  # fmt: skip

    def rows(self, batch: Batch, collect: Collect, width: int | None = None) -> Tensor: ...


class Side(Protocol):
    """One task in `rl`, made on every rank alike. Every method is collective."""

    @property
    def directory(self) -> str:
        """Hugging Face directory that policy and sampler start from."""

    @property
    def shape(self) -> ModelShape:
        """Of the policy."""

    @property
    def n_rows(self) -> int:
        """Prompts to draw from."""

    @property
    def tokenizer(self) -> ModelTokenizer: ...

    @property
    def interventions(self) -> tuple[Intervention, ...]:
        """Of policy and sampler."""

    @property
    def marker(self) -> Marker | None: ...

    @property
    def vectors(self) -> Vectors:
        """What the interventions take, by row."""

    @property
    def policy(self) -> Policy: ...

    @property
    def model(self) -> Any:
        """The Megatron model whose weights the sampler must have; None where they never change."""

    @property
    def learners(self) -> Mapping[str, Stateful]:
        """All that a checkpoint holds, by name."""

    own_keys: ClassVar[tuple[str, ...]]
    """Keys of `RlConfig` that this task reads and others do not."""

    def __init__(self, config: RlConfig, world: World): ...

    @staticmethod
    def directory_of(config: RlConfig) -> str:
        """What `directory` will be."""

    @staticmethod
    def check(config: RlConfig, world_size: int) -> Prompts:
        """All checks that need no model; raises named errors."""

    @staticmethod
    def alone(config: RlConfig) -> Callable[[RlConfig, World], None] | None:
        """What runs in place of the loop, where the configuration asks for a training that samples nothing."""

    def make_reference(self) -> Reference:
        """Of a KL term: the policy as it is now, which is as this stage starts, or what follows it from here."""

    def requests(self, rows: Sequence[int], step: int) -> list[PromptRequest]:
        """One prompt per row; groups are numbered from 0."""

    def place(self, row: int) -> Mapping[str, Any]:
        """Where a row of the training rows can be found again, for records."""

    def batch(self, rollouts: Sequence[Rollout], step: int, fields: Mapping[str, Tensor]) -> Batch:
        """Sequences of the policy with the field `mask` (`models.batching.response_mask`) and `fields`."""

    def measure(self, batch: RolloutBatch, step: int) -> Measured:
        """What rewards are made of, by models as they are before they learn of this step."""

    def learn(self, batch: RolloutBatch, measured: Measured, step: int) -> dict[str, float]:
        """After the policy's update: what learns beside it does; returns what to log."""

    def evaluate(self, engine: Sampler, step: int) -> dict[str, float]:
        """Numbers on held-out rows with the models as they are; empty where there are none. Step -1 is before any."""

    def export(self) -> None:
        """Write what was trained into the run's directory."""
