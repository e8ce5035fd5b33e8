"""Which ranks may sample beside others, and what an engine on a CPU is not started with."""

from __future__ import annotations

import pytest

from nla_megatron.config.schema import RolloutConfig
from nla_megatron.errors import ConfigError, LayoutError
from nla_megatron.rollout.start import _device_options, check_part
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
