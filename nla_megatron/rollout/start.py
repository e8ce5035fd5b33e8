"""Starting vLLM in this process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nla_megatron.interventions.spec import Intervention
from nla_megatron.parallel.collectives import broadcast_object
from nla_megatron.parallel.world import World
from nla_megatron.rollout import adapter, plugin
from nla_megatron.types import ModelShape

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
        VersionError: a version of vLLM that the plug-in was not tested with.
    """
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_NO_USAGE_STATS="1",
        # The second model runner, the default where Triton is there, has no place to mark the tokens of a batch.
        VLLM_USE_V2_MODEL_RUNNER="0",
        VLLM_CPU_OMP_THREADS_BIND=_cores(world.size),
    )
    import vllm

    plugin.check_version(vllm.__version__)
    plugin.register()
    dtype: Any = config.dtype
    return vllm.LLM(
        model,
        dtype=dtype,
        max_model_len=min(config.max_model_len, shape.max_positions),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        enable_prefix_caching=config.prefix_caching,
        tensor_parallel_size=config.tp,
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
    options: dict[str, Any] = {"enforce_eager": not compiled}
    if config.lora == "adapter":
        options |= adapter.options(config.lora_rank)
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
    os.environ[cpu_worker.NAME_VARIABLE] = broadcast_object(cpu_worker.segment_name() if world.is_main else None, world)
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
