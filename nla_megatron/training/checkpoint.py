"""Checkpoints of a training stage: megatron-core's distributed format, atomic, readable on any layout.

    run/checkpoints/step_00000100/{module}/…   one distributed checkpoint per module: weights and optimizer
    run/checkpoints/step_00000100/state.json   stage, step, schedule, layout: what makes it complete

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

    def __init__(self, run_dir: str | Path, stage: str, world: World, keep: int):
        self.directory, self.stage, self.world, self.keep = Path(run_dir) / "checkpoints", stage, world, keep

    def steps(self) -> list[int]:
        """Complete checkpoints, oldest first."""
        return sorted(int(path.parent.name.removeprefix("step_")) for path in self.directory.glob("step_*/state.json")
                      if not path.parent.name.endswith(".partial"))  # fmt: skip

    def save(
        self, step: int, modules: Mapping[str, Stateful], extra: dict[str, Any], memory: Mapping[str, Memory]
    ) -> None:
        """Write the state after `step` steps; collective."""
        from megatron.core import dist_checkpointing

        final = self.directory / f"step_{step:08d}"
        partial = final.with_suffix(".partial")
        if self.world.is_main:
            for stale in self.directory.glob("*.partial"):
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
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self.directory / f"step_{old:08d}")
        barrier(self.world)

    def resume(self, modules: Mapping[str, Stateful], expected: dict[str, Any], memory: Mapping[str, Memory]) -> int:
        """Load the newest complete checkpoint; returns the steps it holds, 0 where there is none. Collective.

        Raises:
            CheckpointError: it is of another stage, of other modules, or of another `expected` entry.
        """
        from megatron.core import dist_checkpointing

        step = broadcast_object(max(self.steps(), default=0) if self.world.is_main else None, self.world)
        if not step:
            return 0
        directory = self.directory / f"step_{step:08d}"
        state = json.loads((directory / "state.json").read_text())
        for key, value in {"stage": self.stage, "modules": sorted(modules), **expected}.items():
            if state.get(key) != value:
                raise CheckpointError(
                    f"{key}={state.get(key)!r} in {directory}",
                    f"{key}={value!r}",
                    "resume with the run's own command, or use another out=",
                )
        for name, module in modules.items():
            with megatron_device():
                module.load_state(dist_checkpointing.load(module.state(loading=True), str(directory / name)))
        for name, kept in memory.items():
            kept.load_state(state["memory"][name])
        torch.set_rng_state(torch.load(directory / "rng.pt", weights_only=True))
        return step
