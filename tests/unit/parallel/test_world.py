"""Parts of a world that leave a rank out, or have it twice, are refused before anything is collective."""

from __future__ import annotations

import pytest

from nla_megatron.errors import LayoutError
from nla_megatron.parallel.world import part_of
from tests.support.worlds import world_of


@pytest.mark.parametrize("parts", [(range(2),), (range(3), range(2, 4)), (range(4), range(4, 6))])
def test_a_world_is_cut_into_parts_that_hold_each_rank_once(parts: tuple[range, ...]) -> None:
    with pytest.raises(LayoutError, match="each of 4 ranks in one part"):
        part_of(world_of(dp=4), parts)
