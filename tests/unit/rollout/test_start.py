"""Which ranks may sample beside others."""

from __future__ import annotations

import pytest

from nla_megatron.errors import LayoutError
from nla_megatron.rollout.start import check_part


@pytest.mark.parametrize(("first", "size"), [(1, 2), (0, 3), (6, 5)])
def test_a_tensor_parallel_group_of_ranks_that_train_and_sample_is_refused(first: int, size: int) -> None:
    with pytest.raises(LayoutError, match=f"ranks {first} to {first + size - 1}"):
        check_part(first, size, 2)


@pytest.mark.parametrize(("first", "size"), [(0, 2), (2, 2), (4, 8)])
def test_parts_of_whole_groups_may(first: int, size: int) -> None:
    check_part(first, size, 2)
