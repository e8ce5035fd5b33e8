"""What tests of single parts share: a world of one rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from nla_megatron.parallel.world import World


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Megatron's groups of a single process; they are gone when the module's tests are."""
    from nla_megatron.config.schema import ParallelConfig
    from nla_megatron.parallel.world import initialise, shut_down

    yield initialise(ParallelConfig())
    shut_down()
