"""The process groups: world = tp x pp x dp for training, as megatron-core lays ranks out (tp fastest, pp slowest)."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist

from nla_megatron.errors import LayoutError
from nla_megatron.parallel import started
from nla_megatron.parallel.cpu import install_cpu_standins, megatron_device

if TYPE_CHECKING:
    from nla_megatron.config.schema import ParallelConfig


@dataclass(frozen=True)
class World:
    """This process among all: sizes, coordinates and device. `control` carries objects and CPU tensors."""

    rank: int
    size: int
    tp: int
    pp: int
    dp: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    device: torch.device
    control: dist.ProcessGroup | None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    @property
    def speaks_for_its_rows(self) -> bool:
        """One rank per data-parallel share: the one whose outputs enter sums over the world."""
        return self.is_last_stage and self.tp_rank == 0

    def layout(self) -> str:
        return f"tp {self.tp} pp {self.pp} dp {self.dp}"


def data_parallel_size(config: ParallelConfig, world_size: int) -> int:
    """The DP size of a world.

    Raises:
        LayoutError: tp x pp does not divide the world, or dp is given and the product differs.
    """
    model = config.tp * config.pp
    if world_size % model:
        raise LayoutError(
            f"{world_size} processes for parallel.tp={config.tp} x parallel.pp={config.pp}",
            f"a multiple of {model} processes",
            "start another number of processes, or change parallel.tp or parallel.pp",
        )  # fmt: skip
    dp = world_size // model
    if config.dp not in (None, dp):
        raise LayoutError(
            f"{world_size} processes for tp {config.tp} x pp {config.pp} x dp {config.dp}",
            f"{model * (config.dp or 1)} processes", "leave parallel.dp out, or start that many processes",
        )  # fmt: skip
    return dp


def initialise(config: ParallelConfig) -> World:
    """Join the process group and build Megatron's groups; a process nobody launched is a world of one."""
    install_cpu_standins()
    _fill_environment()
    cuda = torch.cuda.is_available()
    timeout = timedelta(minutes=config.timeout_minutes)
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout)
    dp = data_parallel_size(config, dist.get_world_size())

    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random as tp_random

    with megatron_device():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tp,
            pipeline_model_parallel_size=config.pp,
            distributed_timeout_minutes=max(1, int(config.timeout_minutes)),
        )
        # Dropout is 0 everywhere, so the tracker's forks have nothing to keep apart; this one makes them no-ops.
        tp_random.initialize_rng_tracker(inference_rng_tracker=True)
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        tp=config.tp,
        pp=config.pp,
        dp=dp,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        device=torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"),
        control=cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout) if cuda else dist.group.WORLD),
    )


def shut_down() -> None:
    """Leave the groups in order, so that the launcher sees clean exits."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    # An engine that was here before has taken the default group down with its own.
    if dist.is_initialized():
        dist.destroy_process_group()


def _fill_environment() -> None:
    """The variables torchrun would set: from an srun step, or for a world of one."""
    if "RANK" in os.environ:
        return
    if started.by_srun():
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise LayoutError(
                f"started by srun without {' and '.join(missing)}",
                "the first node's address in MASTER_ADDR and a free port in MASTER_PORT",
                "export both in the batch script before srun",
            )
        local = os.environ.get("SLURM_LOCALID", "0")
        os.environ.update(RANK=str(started.rank()), LOCAL_RANK=local, WORLD_SIZE=str(started.world_size()))
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
