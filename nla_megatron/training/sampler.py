"""Who writes the responses that `rl` learns from, and how it comes by the policy's weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from nla_megatron.config.schema import RlConfig
from nla_megatron.conversion.hf import read_shape
from nla_megatron.interventions.projection import projector
from nla_megatron.models.projections import whole_projections
from nla_megatron.parallel.world import World
from nla_megatron.rollout.engine import Engine
from nla_megatron.rollout.requests import PromptRequest, Vectors
from nla_megatron.training.lora import rollout_of
from nla_megatron.types import Rollout, RolloutBatch

if TYPE_CHECKING:
    from nla_megatron.training.sides.base import Side


class Sampler(Protocol):
    """What the loop asks of it; every method is collective. `rollout.engine.Engine` says more of the first two."""

    def generate(
        self, requests: Sequence[PromptRequest], vectors: Vectors, samples: int, training_step: int = 0
    ) -> RolloutBatch:
        """`samples` responses per request."""

    def score(
        self, recorded: Sequence[Rollout], asked_for: Sequence[PromptRequest], vectors: Vectors, training_step: int = 0
    ) -> RolloutBatch:
        """The same rollouts with log-probs under the present weights."""

    def changed_tokens(self) -> int:
        """How many the interventions changed in the last batch, with those that were kept as changed before."""

    def take_weights(self) -> None:
        """Those that the policy has now."""

    def close(self) -> None: ...


SamplerOf = Callable[[RlConfig, "Side", World], Sampler]
"""Makes the sampler of a side's policy; collective."""


def make_sampler(config: RlConfig, side: Side, world: World) -> Sampler:
    """The one that `rollout.engine` names; collective."""
    if config.rollout.engine == "policy":
        from nla_megatron.training.own_sampler import PolicySampler

        return PolicySampler(config, side, world)
    return PolicyEngine(config, side, world)


class PolicyEngine(Engine):
    """vLLM in the ranks that train, with weights, and the projections of what is injected, from the side's model."""

    def __init__(self, config: RlConfig, side: Side, world: World):
        super().__init__(
            side.directory, side.shape, rollout_of(config, side.shape), side.interventions, world,
            side.tokenizer.end_ids, config.seed, marker=side.marker, project=projector({}),
        )  # fmt: skip
        self.model = side.model
        self.hand_over = self._weights(side) if side.model is not None else self.forget

    def _weights(self, side: Side) -> Callable[[], None]:
        """How the policy's weights come here: all of them, adapters merged, or the adapters alone."""
        # These import vLLM, for which the checks before the run need not wait.
        if self.config.lora == "adapter":
            from nla_megatron.reshard.adapter import AdapterResharder

            pairs = AdapterResharder(side.model, side.shape, self.llm, self.world)
            return lambda: pairs.load(self.load_adapter)
        from nla_megatron.reshard.resharder import Resharder

        resharder = Resharder(side.model, side.shape, self.llm, read_shape(side.directory), self.world)

        def load() -> None:
            with self.replacing_weights():
                resharder.load()

        return load

    def take_weights(self) -> None:
        # Where the model stays as it is, how it is steered does not: nothing kept for the last step serves the next.
        self.hand_over()
        if self.model is not None:
            self.project = projector(whole_projections(self.model, self.world))
