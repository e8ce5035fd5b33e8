"""Starting vLLM in this process."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nla_megatron.conversion.formats.config_file import settled_directory
from nla_megatron.errors import ConfigError, LayoutError, MemoryShort
from nla_megatron.interventions.spec import Intervention
from nla_megatron.parallel.collectives import broadcast_object
from nla_megatron.parallel.world import World
from nla_megatron.rollout import adapter, plugin
from nla_megatron.types import ModelShape

_MEMORY = re.compile(r"memory.*(?:less than|kv cache)|kv cache.*memory", re.IGNORECASE)
SEGMENT_VARIABLE = "NLA_MEGATRON_SEGMENTS"
"""Tells a CPU worker what its engine's shared memory is called."""

if TYPE_CHECKING:
    from nla_megatron.config.schema import RolloutConfig


def start(
    model: str,
    shape: ModelShape,
    config: RolloutConfig,
    interventions: Sequence[Intervention],
    world: World,
    seed: int,
) -> Any:
    """An `LLM` whose worker lives in this process and intervenes.

    Raises:
        VersionError: no vLLM, or a version that the plug-in was not tested with.
        ConfigError: expert parallelism on a CPU.
        MemoryShort: other programs, or the models of this one, have left too little.
    """
    options = _options(model, shape, config, interventions, world, seed)
    import vllm

    with memory_named():
        return vllm.LLM(**options)


@contextmanager
def memory_named() -> Iterator[None]:
    """Inside, what vLLM refuses for want of memory on a CPU raises MemoryShort."""
    try:
        yield
    except ValueError as error:
        if not _MEMORY.search(str(error)):
            raise
        raise MemoryShort(
            str(error).partition(". ")[0], "memory for the sampler's weights and its cache of keys and values",
            "end what else takes memory, take fewer processes, or lower rollout.cpu_kv_cache_gib",
        ) from error  # fmt: skip


def stand_by(model: str, shape: ModelShape, config: RolloutConfig, world: World) -> None:
    """What a rank that only trains does while other ranks of its process group start an engine with `start`.

    vLLM makes its groups with all ranks of the process group, whether they sample or not; this rank takes part in
    that and holds nothing else of it.

    Args:
        config: the engine's.
        world: the ranks that stand by, see `parallel.world.part_of`.

    Raises:
        LayoutError, VersionError: as the engine.
    """
    options = _options(model, shape, config, (), world, 0)
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed.parallel_state import get_world_group
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu_worker import init_worker_distributed_environment

    vllm_config = EngineArgs(**options).create_engine_config()
    rank, local = torch.distributed.get_rank(), int(os.environ["LOCAL_RANK"])
    # Its collectives on a CPU ask for a name, which the worker of an engine sets.
    os.environ["VLLM_DIST_IDENT"] = os.environ.get(SEGMENT_VARIABLE, "")
    with set_current_vllm_config(vllm_config):
        init_worker_distributed_environment(vllm_config, rank, "env://", local, current_platform.dist_backend)
    # The engine's ranks agree on their memory over all of vLLM's world.
    unlimited = torch.tensor([[torch.iinfo(torch.int64).max]])
    torch.distributed.all_reduce(unlimited, op=torch.distributed.ReduceOp.MIN, group=get_world_group().cpu_group)


def check_part(first: int, size: int, tp: int) -> None:
    """Whether vLLM's groups, of `tp` ranks each from rank 0 of the process group, lie within a part of it.

    Raises:
        LayoutError: one would hold ranks of two parts, and they would wait for each other for ever.
    """
    if first % tp or size % tp:
        raise LayoutError(
            f"ranks {first} to {first + size - 1} beside others, with rollout.tp={tp}",
            f"parts that begin and end at multiples of {tp}", "change rollout.tp, or which ranks sample",
        )  # fmt: skip


def _options(
    model: str,
    shape: ModelShape,
    config: RolloutConfig,
    interventions: Sequence[Intervention],
    world: World,
    seed: int,
) -> dict[str, Any]:
    """Of vLLM's engine; sets the environment that it reads."""
    import torch

    check_part(torch.distributed.get_rank() - world.rank, world.size, config.tp)
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_NO_USAGE_STATS="1",
        # The second model runner, the default where Triton is there, has no place to mark the tokens of a batch.
        VLLM_USE_V2_MODEL_RUNNER="0",
        # vLLM looks its own up by the rank on this machine, among whatever ranks.
        VLLM_CPU_OMP_THREADS_BIND=_cores(max(world.size, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))),
    )
    plugin.check_installed()
    import vllm

    plugin.check_version(vllm.__version__)
    plugin.register()
    settled = str(settled_directory(model))
    return dict(
        model=model,
        hf_config_path=settled,
        tokenizer=settled,
        load_format=plugin.register_loader(),
        dtype=config.dtype,
        max_model_len=min(config.max_model_len, shape.max_positions),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        enable_prefix_caching=config.prefix_caching,
        tensor_parallel_size=config.tp,
        enable_expert_parallel=config.expert_parallel,
        distributed_executor_backend="external_launcher",
        # Compiled graphs are kept by a digest of this too: one interferes with no other's.
        additional_config={plugin.NAME: [each.to_dict() for each in interventions]},
        # Before the filters, which would renormalise; our sampler takes the temperature in, as the trainer does.
        logprobs_mode="raw_logprobs",
        seed=seed,
        disable_log_stats=True,
        use_tqdm_on_load=False,
        **_device_options(config, world),
    )


def _device_options(config: RolloutConfig, world: World) -> dict[str, Any]:
    on_gpu = world.device.type != "cpu"
    compiled = on_gpu if config.compiled is None else config.compiled
    if config.expert_parallel and not on_gpu:
        raise ConfigError(
            "rollout.expert_parallel=true on a CPU",
            "false: such an engine crashes there",
            "drop rollout.expert_parallel",
        )
    options: dict[str, Any] = {"enforce_eager": not compiled}
    if config.lora == "adapter":
        options |= adapter.options(config.lora_rank or adapter.USUAL_RANK)
    if config.kv_block_size is not None:
        options["block_size"] = config.kv_block_size
    if on_gpu:
        from nla_megatron.rollout import gpu_worker

        return options | {
            "worker_cls": f"{gpu_worker.__name__}.{gpu_worker.InterveningGpuWorker.__name__}",
            "gpu_memory_utilization": config.gpu_memory_utilization,
            "enable_sleep_mode": config.sleep,
        }
    from nla_megatron.rollout import cpu_worker

    if world.is_main:
        cpu_worker.remove_stale_segments()
    os.environ[SEGMENT_VARIABLE] = broadcast_object(cpu_worker.segment_name() if world.is_main else None, world)
    return options | {
        "worker_cls": f"{cpu_worker.__name__}.{cpu_worker.IsolatedCpuWorker.__name__}",
        "kv_cache_memory_bytes": int(config.cpu_kv_cache_gib * 2**30),
    }


def _cores(ranks: int) -> str:
    """vLLM's CPU binding: the machine's cores dealt to the ranks, shared where there are fewer cores than ranks."""
    cores = os.cpu_count() or 1
    share = max(1, cores // ranks)
    first = [rank * share % cores for rank in range(ranks)]
    return "|".join(f"{core}-{core + share - 1}" if share > 1 else str(core) for core in first)
