"""Files that hold a JSON object, whatever else they turn out to hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nla_megatron.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object. Raises CheckpointError where it is damaged, or cannot be read at all."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: {_told(path, error)}", "a JSON object", "download or write this file again"
        ) from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: a {type(found).__name__}", "a JSON object", "download or write this file again")
    return found


def _told(path: Path, error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if path.stat().st_size == 0:
        return "an empty file"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
