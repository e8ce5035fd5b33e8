"""The process groups: world = tp x pp x dp for training, as megatron-core lays ranks out (tp fastest, pp slowest).

The experts of a mixture have a grid of their own on the same stages: etp x ep x (what is left), etp fastest.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist

from nla_megatron.errors import LayoutError
from nla_megatron.parallel import started
from nla_megatron.parallel.cpu import install_cpu_standins, leave_cuda_rng_alone, megatron_device

if TYPE_CHECKING:
    from nla_megatron.config.schema import ParallelConfig


@dataclass(frozen=True)
class World:
    """This process among all: sizes, coordinates and device. `control` carries objects and CPU tensors.

    `vpp` chunks of blocks lie on each pipeline stage; `stages` are the blocks of each chunk in the model's order, None
    for an even division. `ar_stages`, `recompute` and `sequence_parallel` are those of `ParallelConfig`.
    """

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
    ep: int = 1
    etp: int = 1
    ep_rank: int = 0
    etp_rank: int = 0
    vpp: int = 1
    stages: tuple[int, ...] | None = None
    recompute: str = "none"
    sequence_parallel: bool = False
    ar_stages: tuple[int, ...] | None = None

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
        sizes = f"tp {self.tp} pp {self.pp} dp {self.dp}"
        if self.ep > 1 or self.etp != self.tp:
            sizes += f" ep {self.ep} etp {self.etp}"
        if self.vpp > 1:
            sizes += f" vpp {self.vpp}"
        dealt = {"stages": self.stages, "ar_stages": self.ar_stages}
        return sizes + "".join(f" {key} {'-'.join(map(str, to))}" for key, to in dealt.items() if to is not None)


def data_parallel_size(config: ParallelConfig, world_size: int) -> int:
    """The DP size of a world.

    Raises:
        LayoutError: tp x pp does not divide the world, dp is given and the product differs, etp x ep does not divide
            the ranks of a pipeline stage, or there are chunks (vpp) without a pipeline.
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
    etp = config.etp or config.tp
    if (config.tp * dp) % (etp * config.ep):
        raise LayoutError(
            f"parallel.ep={config.ep} x etp {etp} on the {config.tp * dp} ranks of a pipeline stage (tp x dp)",
            f"a product that divides {config.tp * dp}",
            "change parallel.ep, parallel.etp or parallel.dp",
        )
    if config.vpp > 1 and config.pp == 1:
        raise LayoutError(
            f"parallel.vpp={config.vpp} at parallel.pp=1", "several pipeline stages", "raise parallel.pp, or drop vpp"
        )
    return dp


def initialise(config: ParallelConfig) -> World:
    """Join the process group and build Megatron's groups; a process nobody launched is a world of one."""
    install_cpu_standins()
    _fill_environment()
    cuda = torch.cuda.is_available()
    timeout = timedelta(minutes=config.timeout_minutes)
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        # A process that was forked from one that imported torch has that one's number of threads.
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // ranks)))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout)
    dp = data_parallel_size(config, dist.get_world_size())

    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random as tp_random

    with megatron_device():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tp,
            pipeline_model_parallel_size=config.pp,
            virtual_pipeline_model_parallel_size=config.vpp if config.vpp > 1 else None,
            expert_model_parallel_size=config.ep,
            expert_tensor_parallel_size=config.etp or config.tp,
            distributed_timeout_minutes=max(1, int(config.timeout_minutes)),
        )
        # Dropout is 0 everywhere, so the tracker's forks have nothing to keep apart; this one makes them no-ops.
        tp_random.initialize_rng_tracker(inference_rng_tracker=True)
        leave_cuda_rng_alone(tp_random)
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
        ep=config.ep,
        etp=config.etp or config.tp,
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        etp_rank=parallel_state.get_expert_tensor_parallel_rank(),
        vpp=config.vpp,
        stages=None if config.stages is None else tuple(config.stages),
        ar_stages=None if config.ar_stages is None else tuple(config.ar_stages),
        recompute=config.recompute,
        sequence_parallel=config.sequence_parallel and config.tp > 1,
    )


def part_of(world: World, parts: Sequence[range]) -> World:
    """The part of a world that this rank is in, with ranks and `control` of its own; collective over the world.

    Sizes and coordinates of training stay those of the whole.

    Raises:
        LayoutError: a rank is in no part, or in several.
    """
    if sorted(rank for ranks in parts for rank in ranks) != list(range(world.size)):
        raise LayoutError(
            f"parts of ranks {[list(ranks) for ranks in parts]}", f"each of {world.size} ranks in one part",
            "correct the ranges",
        )  # fmt: skip
    mine = None
    for ranks in parts:
        group = dist.new_group(list(ranks), backend="gloo")
        if world.rank in ranks:
            mine = replace(world, rank=ranks.index(world.rank), size=len(ranks), control=cast(dist.ProcessGroup, group))
    assert mine is not None
    return mine


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
