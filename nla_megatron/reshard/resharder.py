"""After each update the policy's weights go into the sampler: planned once, carried out each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from nla_megatron.parallel.collectives import gather_objects
from nla_megatron.parallel.world import World
from nla_megatron.reshard import vllm_load
from nla_megatron.reshard.carriers import Claim, Plan, Sampler
from nla_megatron.reshard.checks import check_held, check_places, check_same_model
from nla_megatron.reshard.execute import Gate, Targets, carry_out, check_finite
from nla_megatron.reshard.masters import claims_of_masters, masters_of, ranges_on
from nla_megatron.reshard.megatron_side import Sources, TrainLayout, claims_of, tensors_of
from nla_megatron.reshard.plan import check_claims, compile_plan
from nla_megatron.reshard.vllm_side import Trace, check_taken, trace
from nla_megatron.types import ModelShape

STAGING = 256 << 20
"""Bytes of packed messages on one rank at once."""
_SAMPLE = 16
"""Regions of each sampler's that are compared after a load."""


def samplers_of(traces: Sequence[Trace], ranks: range) -> list[Sampler]:
    """Replicas of `len(traces)` ranks each, as vLLM lays them out on `ranks`."""
    tp = len(traces)
    return [Sampler(tuple(ranks[number::tp]), found.needs) for number, found in enumerate(traces)]


def held(
    model: Any, shape: ModelShape, layout: TrainLayout, world: World, optimizer: Any = None
) -> tuple[Sources, list[Claim]]:
    """What this rank hands over, and what all claim to hold; masters where there is an optimizer. Collective."""
    claims = claims_of(shape, layout)
    mine = {} if optimizer is None else ranges_on(model, optimizer)
    # Ranks that only sample have no optimizer, and take part.
    ranges = gather_objects(mine, world)
    claims = claims_of_masters(claims, ranges) if any(ranges) else claims
    return Sources(model, world, masters_of(model, mine)), claims


class Nowhere:
    """The targets of a rank that needs nothing."""

    def tensor(self, name: str) -> Tensor:
        raise AssertionError(f"{name} on a rank that needs nothing")

    def finish(self, name: str) -> None:
        raise AssertionError(f"{name} on a rank that needs nothing")


class Transfer:
    """A plan between one model's ranks and samplers, and its repeated execution with the checks around it.

    Every method is collective: all ranks of the world call it.

    Raises:
        OverlappingClaims, UnheldRegion, ConfigError: there is no plan.
    """

    def __init__(
        self, sources: Sources, claims: list[Claim], samplers: list[Sampler], world: World, staging: int = STAGING
    ):
        check_claims(claims)
        dtype = check_held(sources, claims, world)
        self.sources, self.claims, self.samplers, self.world = sources, claims, samplers, world
        self.plan: Plan = compile_plan(claims, samplers, world.rank, dtype, staging)
        self.peak = 0

    def run(self, targets: Callable[[Gate], Targets], seed: int) -> Targets:
        """Move the weights as they are now.

        Raises:
            NotFinite: before anything is written.
            PeerLost: another rank ended meanwhile.
            ReshardMismatch: a sample of regions differs between the two sides.
        """
        check_finite(self.sources.checked, self.world)
        gate = Gate(self.claims, self.samplers, self.world.rank, _SAMPLE, seed)
        gate.left(self.sources)
        into = targets(gate)
        self.peak = carry_out(self.plan, self.sources, into, self.world.device, self.sources.made)
        gate.compare(self.world)
        return into


class Resharder:
    """From a live Megatron model to the vLLM of the same process group: of the same ranks, or of others.

    Args:
        model: a model, or the list of this rank's chunks; an empty one on a rank that only samples.
        llm: an `LLM` whose worker lives in this process, over all of `samplers`: replicas of its tensor-parallel size.
            None on a rank that only trains.
        sampler_shape: of the directory that the engine was started with.
        optimizer: megatron-core's distributed one, whose fp32 masters are handed over in the place of the parameters.
            Each replica holds only its part of them, so more travels; a sampler in bf16 gets the same bits either way.
        layout: where the trainer lies, by default on all ranks.
        samplers: the ranks that sample, by default all.

    Raises:
        ConfigError: an optimizer without shared-out masters, or parameters of several dtypes.
        LayoutError: trainer or sampler do not lie as they say.
        ModelsDiffer: the two sides are not the same model.
        OverlappingClaims, UnheldRegion: there is no plan.
    """

    def __init__(self, model: Any, shape: ModelShape, llm: Any, sampler_shape: ModelShape, world: World,
                 staging: int = STAGING, optimizer: Any = None, layout: TrainLayout | None = None,
                 samplers: range | None = None):  # fmt: skip
        check_same_model(shape, sampler_shape)
        ranks = range(world.size) if samplers is None else samplers
        layout, tensors = layout or TrainLayout.of(world), tensors_of(shape)
        self.worker = None if llm is None else llm.llm_engine.model_executor.driver_worker.worker
        self.trace, self.loads = None, 0
        parallel = None if self.worker is None else self.worker.vllm_config.parallel_config
        engines = gather_objects(0 if parallel is None else parallel.tensor_parallel_size, world)
        tp, first_replica = check_places(layout, ranks, engines), None
        if self.worker is not None and parallel is not None:
            place = ranks.index(world.rank)
            self.trace = trace(self.worker.vllm_config, tensors, place % tp, tp, parallel.enable_expert_parallel)
            vllm_load.install(self.worker, self._load)
            first_replica = self.trace if place < tp else None
        traces = [one for one in gather_objects(first_replica, world) if one is not None]
        check_taken(traces, tensors)
        sources, claims = held(model, shape, layout, world, optimizer)
        self.transfer = Transfer(sources, claims, samplers_of(traces, ranks), world, staging)

    def load(self) -> None:
        """Collective: hand the model's present weights to the sampler. Raises NotFinite, PeerLost, ReshardMismatch.

        On a rank with an engine it is called inside `Engine.replacing_weights`, which empties the prefix cache and lets
        a half-loaded engine generate nothing; `vllm_load.update` alone does neither. A rank that only trains has no
        engine, and NotFinite is raised before anything is written.
        """
        if self.worker is None:
            self._load()
        else:
            vllm_load.update(self.worker)

    def _load(self) -> None:
        self.loads += 1
        into = self.transfer.run(self._targets, seed=self.loads)
        if isinstance(into, vllm_load.VllmTargets):
            into.end()

    def _targets(self, gate: Gate) -> Targets:
        if self.worker is None or self.trace is None:
            return Nowhere()
        return vllm_load.VllmTargets(self.worker, self.trace, gate.arrived)
