"""Files that appear whole or not at all, and the commit of the code that writes them."""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nla_megatron.errors import ColumnError, NlaError
from nla_megatron.reading import json_objects

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """A hidden temporary path beside `path`, renamed to it when the block ends well and removed when it does not.

    Readers and concurrent writers see the old file or the new one, never a part. The bytes reach the disk before the
    rename, so the claim also holds after a power cut. Missing parent directories are made.

    Example:
        >>> with atomic_path("report.yaml") as temporary:
        ...     temporary.write_text("ok: true")
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path | str, values: dict[str, Any]) -> None:
    """Write a record as readable JSON, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")


def write_json_lines(path: Path | str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write records as JSON, one per line, whole or not at all."""
    with atomic_path(path) as temporary:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        temporary.write_text("".join(lines), encoding="utf-8", errors="replace")  # a model can write half a character


def read_json_lines(path: Path | str, error: type[NlaError] = ColumnError) -> list[dict[str, Any]]:
    """The records of `write_json_lines`. Raises MissingFile, or `error` with the line that is no record."""
    return [row for _, row in json_objects(path, error, "write the file again")]


def git_commit() -> str:
    """The short commit of this code, or "" where it does not run from a repository."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
