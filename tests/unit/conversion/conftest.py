"""What tests of conversions share: a tiny base model with weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tiny import tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory, one for each module."""
    return tiny_model(tmp_path_factory.mktemp("base"))
