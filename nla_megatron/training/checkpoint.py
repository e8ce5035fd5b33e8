"""Checkpoints of a training stage: megatron-core's distributed format, atomic, readable on any layout.

    run/checkpoints/step_00000100/{module}/…   one distributed checkpoint per module: weights and optimizer
    run/checkpoints/step_00000100/state.json   stage, step, schedule, layout: what makes it complete
    run/checkpoints/permanent/step_…           the same, of every `keep_every`th step: never pruned

A step's directory appears by one rename when all of it is on disk; a killed save leaves a `.partial` directory that
nobody reads and the next save removes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from nla_megatron.config.run_directory import CHECKPOINTS, PERMANENT, complete_steps, permanent_steps
from nla_megatron.errors import CheckpointError
from nla_megatron.parallel.collectives import barrier, broadcast_object
from nla_megatron.parallel.cpu import megatron_device
from nla_megatron.parallel.world import World


class Stateful(Protocol):
    """Something with a sharded state: `TrainModule`, or what has its two methods."""

    def state(self, loading: bool) -> dict[str, Any]: ...

    def load_state(self, loaded: dict[str, Any]) -> None: ...


class Memory(Protocol):
    """Something that carries numbers from step to step, the same on every rank."""

    def state(self) -> dict[str, float]: ...

    def load_state(self, state: dict[str, float]) -> None: ...


class Checkpoints:
    """The checkpoints of one run.

    All randomness of a run is a function of (seed, step, row), so the data position is the step; torch's generator is
    kept as well, for whatever a model may draw.
    """

    def __init__(self, run_dir: str | Path, stage: str, world: World, keep: int, keep_every: int = 0):
        self.directory, self.stage, self.world = Path(run_dir) / CHECKPOINTS, stage, world
        self.keep, self.keep_every = keep, keep_every
        self.found: dict[str, Any] = {}
        """What the checkpoint that was resumed from says of itself."""

    def steps(self) -> dict[int, Path]:
        """Complete checkpoints by step, oldest first. A step that is there twice counts as permanent."""
        return complete_steps(self.directory) | permanent_steps(self.directory.parent)

    def _place(self, step: int) -> Path:
        permanent = self.keep_every > 0 and step % self.keep_every == 0
        return (self.directory / PERMANENT if permanent else self.directory) / f"step_{step:08d}"

    def save(
        self, step: int, modules: Mapping[str, Stateful], extra: dict[str, Any], memory: Mapping[str, Memory]
    ) -> None:
        """Write the state after `step` steps; collective."""
        from megatron.core import dist_checkpointing

        final = self._place(step)
        partial = final.with_suffix(".partial")
        if self.world.is_main:
            for stale in (*self.directory.glob("*.partial"), *self.directory.glob(f"{PERMANENT}/*.partial")):
                shutil.rmtree(stale)
            for name in modules:
                (partial / name).mkdir(parents=True)
        barrier(self.world)
        for name, module in modules.items():
            with megatron_device():
                dist_checkpointing.save(module.state(loading=False), str(partial / name), async_sharded_save=False)
        if self.world.is_main:
            state = {
                "stage": self.stage,
                "step": step,
                "layout": self.world.layout(),
                "modules": sorted(modules),
                "memory": {name: kept.state() for name, kept in memory.items()},
                **extra,
            }
            torch.save(torch.get_rng_state(), partial / "rng.pt")
            (partial / "state.json").write_text(json.dumps(state, indent=2))
            partial.rename(final)
            for old in list(complete_steps(self.directory).values())[: -self.keep]:
                shutil.rmtree(old)
        barrier(self.world)

    def resume(self, modules: Mapping[str, Stateful], expected: dict[str, Any], memory: Mapping[str, Memory]) -> int:
        """Load the newest complete checkpoint; returns the steps it holds, 0 where there is none. Collective.

        Raises:
            CheckpointError: it is of another stage, of other modules or memories, or of another `expected` entry.
        """
        newest = max(self.steps().items(), default=None) if self.world.is_main else None
        newest = broadcast_object(newest, self.world)
        if newest is None:
            return 0
        step, directory = newest
        state = json.loads((directory / "state.json").read_text())
        found = {**state, "memory": sorted(state.get("memory", {}))}
        wanted = {"stage": self.stage, "modules": sorted(modules), "memory": sorted(memory), **expected}
        for key, value in wanted.items():
            if found.get(key) != value:
                raise CheckpointError(
                    f"{key}={found.get(key)!r} in {directory}",
                    f"{key}={value!r}",
                    "resume with the run's own command, or use another out=",
                )
        self.found = state
        load_modules(directory, modules)
        for name, kept in memory.items():
            kept.load_state(state["memory"][name])
        torch.set_rng_state(torch.load(directory / "rng.pt", weights_only=True))
        return step


def load_modules(directory: Path, modules: Mapping[str, Stateful]) -> None:
    """What a step's directory holds of these modules; collective."""
    from megatron.core import dist_checkpointing

    for name, module in modules.items():
        with megatron_device():
            module.load_state(dist_checkpointing.load(module.state(loading=True), str(directory / name)))
