"""A curriculum: how the injection of a training leads to the one that the table records.

Strengths and blocks of a step travel with each request and each row, so that sampler and trainer inject alike, and what
names no step (every evaluation) gets the recorded injection.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nla_megatron.config.schema import CurriculumConfig
from nla_megatron.contract.blocks import InjectionSpec, ProjectionSpec
from nla_megatron.errors import ConfigError
from nla_megatron.interventions.schedules import Schedule
from nla_megatron.interventions.spec import TOKEN_EMBEDDING, Intervention
from nla_megatron.types import Strengths


@dataclass(frozen=True)
class Condition:
    """How one step injects: as `PromptRequest` and `Batch` take it. None is the injection as recorded."""

    only: tuple[int, ...] | None = None
    strengths: Strengths | None = None


@dataclass(frozen=True)
class Curriculum:
    """The interventions of a table for a whole training, and which of them a step uses.

    Example:
        >>> curriculum = Curriculum.of(InjectionSpec("norm_add", 1, 1.0), CurriculumConfig("linear", 3.0, steps=10))
        >>> curriculum.at(5).strengths, curriculum.at(10).strengths
        (((2.0,),), None)
    """

    interventions: tuple[Intervention, ...]
    recorded: int
    config: CurriculumConfig = field(default_factory=CurriculumConfig)

    @classmethod
    def of(
        cls,
        injection: InjectionSpec,
        config: CurriculumConfig,
        num_layers: int | None = None,
        vectors: int = 1,
        fewest: int | None = None,
    ) -> Curriculum:
        """Those of the record first, then one for each further block of the curriculum.

        Args:
            num_layers: the AV's blocks; None checks none.
            vectors: how many activations a row of the table keeps.
            fewest: where a row may keep fewer, at least so many.

        Raises:
            ConfigError: a block of the curriculum that the model lacks, any block where the injection projects, or a
                strength of nothing for `replace`.
        """
        for block in config.layers:
            if num_layers is not None and block >= num_layers:
                raise ConfigError(
                    f"curriculum.layers={list(config.layers)}",
                    f"blocks of the AV, {TOKEN_EMBEDDING} to {num_layers - 1}", "correct curriculum.layers",
                )  # fmt: skip
        if injection.projection is not None and config.layers:
            raise ConfigError(
                f"curriculum.layers={list(config.layers)} of a table whose injection projects",
                "none: each block has a projection of its own, and the recorded one would learn last",
                "remove curriculum.layers",
            )
        scale = 1.0 if injection.scale is None else float(injection.scale)
        further = [block for block in dict.fromkeys(config.layers) if block not in injection.blocks]
        learned = injection.projection or ProjectionSpec()
        interventions = tuple(
            Intervention.recorded(injection.method, block, scale, vectors, learned.then, learned.layers, fewest)
            for block in (*injection.blocks, *further)
        )
        if config.start == 0 and any(each.formula == "replace" for each in interventions):
            raise ConfigError(
                "curriculum.start=0 where the vector replaces the stream", "above 0", "set curriculum.start"
            )
        return cls(interventions, len(injection.blocks), config)

    def at(self, training_step: int | None) -> Condition:
        """The injection of a training step, 0-based; None is after the curriculum's end."""
        config, count = self.config, len(self.interventions)
        own = None if count == self.recorded else tuple(range(self.recorded))
        if training_step is None or training_step >= config.steps:
            return Condition(only=own)
        if config.layers:
            # Each has an equal part of the steps; the first ones take the remainder.
            block = config.layers[training_step * len(config.layers) // config.steps]
            place = Intervention.recorded(self.interventions[0].mode, block, 1.0).layer
            own = tuple(number for number, each in enumerate(self.interventions) if each.layer == place)
        factor = Schedule(config.kind, "training", config.start, 1.0, config.steps).factor(training_step)
        return Condition(own, None if factor == 1.0 else ((factor,),) * count)
