"""What tests of single parts share: a world of one rank, and the directory of a tiny policy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.tiny import tiny_model

if TYPE_CHECKING:
    from nla_megatron.parallel.world import World


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Megatron's groups of a single process; they are gone when the module's tests are."""
    from nla_megatron.config.schema import ParallelConfig
    from nla_megatron.parallel.world import initialise, shut_down

    yield initialise(ParallelConfig())
    shut_down()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny policy as transformers writes it."""
    return tiny_model(tmp_path_factory.mktemp("policy"))
