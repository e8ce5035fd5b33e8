"""Files of a model directory that hold a JSON object, whatever else they turn out to hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nla_megatron.errors import CheckpointError
from nla_megatron.reading import read_object


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object. Raises CheckpointError where it is damaged, or others cannot read it."""
    return read_object(path, CheckpointError, "download or write this file again", mark=False)
