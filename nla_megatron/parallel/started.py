"""Who started this process: torchrun, srun, or nobody. Reads the environment alone, so that it costs nothing."""

from __future__ import annotations

import os


def by_srun() -> bool:
    """A task of an srun step; a batch script has most of Slurm's variables too, but it is no rank."""
    return "RANK" not in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ


def rank() -> int:
    """This process's rank; 0 for a process that nobody started."""
    return int(os.environ["SLURM_PROCID"]) if by_srun() else int(os.environ.get("RANK", "0"))


def world_size() -> int | None:
    """How many ranks were started; None for a process that nobody started."""
    if by_srun():
        return int(os.environ["SLURM_STEP_NUM_TASKS"])
    return int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None
