"""Checkpoints of a training stage: megatron-core's distributed format, atomic, readable on any layout.

    run/checkpoints/step_00000100/{module}/…   one distributed checkpoint per module: weights and optimizer
    run/checkpoints/step_00000100/state.json   stage, step, schedule, layout
    run/checkpoints/step_00000100/files.json   size and checksum of every file: what makes it complete
    run/checkpoints/permanent/step_…           the same, of every `keep_every`th step: never pruned

A step's directory appears by one rename when all of it is on disk; a killed save leaves a `.partial` directory that
nobody reads and the next save removes. One that a disk has lost part of since is put aside as `.torn`, and the one
before it is taken.
"""

from __future__ import annotations

import json
import queue
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch

from nla_megatron.config.run_directory import CHECKPOINTS, PERMANENT, complete_steps, saved_steps
from nla_megatron.conversion.completeness import GENERATOR, STATE, faults, seal, shortened
from nla_megatron.disk import room_on
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

    def _place(self, step: int) -> Path:
        permanent = self.keep_every > 0 and step % self.keep_every == 0
        return (self.directory / PERMANENT if permanent else self.directory) / f"step_{step:08d}"

    def save(
        self, step: int, modules: Mapping[str, Stateful], extra: dict[str, Any], memory: Mapping[str, Memory]
    ) -> None:
        """Write the state after `step` steps; collective. Raises DiskFull; the checkpoints before it stay."""
        final = self._place(step)
        with room_on(final, "make room and repeat the command: it goes on from the checkpoint before this one"):
            self._write(final, step, modules, extra, memory)
        barrier(self.world)

    def _write(
        self,
        final: Path,
        step: int,
        modules: Mapping[str, Stateful],
        extra: dict[str, Any],
        memory: Mapping[str, Memory],
    ) -> None:
        from megatron.core import dist_checkpointing

        partial = final.with_suffix(".partial")
        if self.world.is_main:
            for stale in (*self.directory.glob("*.partial"), *self.directory.glob(f"{PERMANENT}/*.partial")):
                shutil.rmtree(stale)
            for name in modules:
                (partial / name).mkdir(parents=True)
        barrier(self.world)
        _collect_here()
        for name, module in modules.items():
            with _failures_as_errors(), megatron_device():
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
            torch.save(torch.get_rng_state(), partial / GENERATOR)
            (partial / STATE).write_text(json.dumps(state, indent=2))
        seal(partial, self.world)
        if self.world.is_main:
            partial.rename(final)
            for old in list(complete_steps(self.directory).values())[: -self.keep]:
                shutil.rmtree(old)

    def resume(self, modules: Mapping[str, Stateful], expected: dict[str, Any], memory: Mapping[str, Memory]) -> int:
        """Load the newest whole checkpoint; returns the steps it holds, 0 where there is none. Collective.

        Raises:
            CheckpointError: there are some and none is whole; it is of another stage, of other modules or memories, or
                of another `expected` entry.
        """
        directory = self._newest_whole()
        if directory is None:
            return 0
        state = json.loads((directory / STATE).read_text())
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
        torch.set_rng_state(torch.load(directory / GENERATOR, weights_only=True))
        return int(state["step"])

    def _newest_whole(self) -> Path | None:
        """None where nothing was saved. Newer ones that are not whole are told of, and put aside. Collective."""
        torn: dict[Path, list[str]] = {}
        for directory in broadcast_object(self._newest_first() if self.world.is_main else None, self.world):
            found = faults(directory, self.world)
            if not found:
                self._put_aside(torn, directory)
                return directory
            torn[directory] = found
        if torn:
            told = "; ".join(f"{directory.name}: {shortened(found)}" for directory, found in torn.items())
            raise CheckpointError(
                f"no whole checkpoint in {self.directory}: {told}", "one with every file as it was written",
                f"copy one back from elsewhere, or remove {self.directory} to begin at step 0",
            )  # fmt: skip
        return None

    def _newest_first(self) -> list[Path]:
        """Every checkpoint. Of a step that is there twice the permanent one comes first."""
        permanent, others = saved_steps(self.directory / PERMANENT), saved_steps(self.directory)
        steps = sorted({*permanent, *others}, reverse=True)
        return [found[step] for step in steps for found in (permanent, others) if step in found]

    def _put_aside(self, torn: Mapping[Path, list[str]], whole: Path) -> None:
        """The step will be saved again, where a torn checkpoint would be in the way."""
        for directory, found in torn.items() if self.world.is_main else ():
            aside = directory.with_suffix(".torn")
            shutil.rmtree(aside, ignore_errors=True)
            directory.rename(aside)
            print(
                f"WARNING: the checkpoint {directory} is not whole: {shortened(found)}.\n"
                f"  The run goes on from {whole} instead; the other is now {aside}, and may be removed.",
                file=sys.stderr, flush=True,
            )  # fmt: skip


@cache
def _collect_here() -> None:
    """What the writers of a checkpoint tell is collected by this process, which waits for them anyway.

    Megatron-core starts a process for it that holds a copy of torch; a run that is killed leaves it behind for good.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    assert hasattr(filesystem_async, "_results_queue")
    filesystem_async._results_queue = queue.Queue()


@contextmanager
def _failures_as_errors() -> Iterator[None]:
    """torch's CheckpointException is no Exception, and would pass by all who tell what went wrong."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as failed:
        raise RuntimeError("a checkpoint was not written or read on all ranks") from failed


def load_modules(directory: Path, modules: Mapping[str, Stateful]) -> None:
    """What a step's directory holds of these modules; collective."""
    from megatron.core import dist_checkpointing

    for name, module in modules.items():
        with _failures_as_errors(), megatron_device():
            module.load_state(dist_checkpointing.load(module.state(loading=True), str(directory / name)))
