"""Which ranks may sample beside others, and what an engine on a CPU is not started with."""

from __future__ import annotations

import pytest

from nla_megatron.config.schema import RolloutConfig
from nla_megatron.errors import ConfigError, LayoutError, MemoryShort
from nla_megatron.rollout.start import _device_options, check_part, memory_named
from tests.support.worlds import world_of


@pytest.mark.parametrize(("first", "size"), [(1, 2), (0, 3), (6, 5)])
def test_a_tensor_parallel_group_of_ranks_that_train_and_sample_is_refused(first: int, size: int) -> None:
    with pytest.raises(LayoutError, match=f"ranks {first} to {first + size - 1}"):
        check_part(first, size, 2)


@pytest.mark.parametrize(("first", "size"), [(0, 2), (2, 2), (4, 8)])
def test_parts_of_whole_groups_may(first: int, size: int) -> None:
    check_part(first, size, 2)


def test_whole_experts_on_a_cpu_are_refused() -> None:
    with pytest.raises(ConfigError, match="expert_parallel=true on a CPU"):
        _device_options(RolloutConfig(tp=2, expert_parallel=True), world_of(tp=2))


def test_too_little_memory_for_the_cache_is_named() -> None:
    told = (
        "Available memory on node 0 (0.69/23.54 GiB) on kv cache allocation is less than requested memory for kv "
        "(1.0 GiB). Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE, or reduce CPU memory used by others."
    )
    with pytest.raises(MemoryShort, match=r"0.69/23.54 GiB") as raised, memory_named():
        raise ValueError(told)
    assert "rollout.cpu_kv_cache_gib" in raised.value.remedy and "--kv" not in str(raised.value)
    with pytest.raises(ValueError, match="another"), memory_named():
        raise ValueError("another mistake")
