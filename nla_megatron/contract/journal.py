"""Records that runs write and read again: an object in a file, or one on each line. What a kill has torn is passed
over, what somebody else has written is named. Files that people bring are read by `nla_megatron.reading`.
"""

from __future__ import annotations

import json
import os
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nla_megatron.errors import MissingFile, RunDirectoryError
from nla_megatron.reading import shown, text_of

Row = Mapping[str, Any]


def read_object(path: Path | str, needs: Sequence[str] = ()) -> dict[str, Any]:
    """The JSON object that a file holds.

    Args:
        needs: keys that it must have.

    Raises:
        MissingFile: there is none.
        RunDirectoryError: it holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFile(f"no file {path}", "what a command writes when it ends", "finish it, or correct the path")
    content = path.read_bytes()
    found = _object(content, needs)
    if found is None:
        raise _foreign(path, str(path), content, needs)
    return found


def read_rows(path: Path | str, needs: Sequence[str] = (), torn: bool = False) -> list[dict[str, Any]]:
    """The objects of a file with one on each line; none where there is no file.

    Args:
        torn: the last line may be half of one, which a kill has left; it is passed over.

    Raises:
        RunDirectoryError: a line that holds something else.
    """
    return [row for _, row in lines_of(path, needs, torn)]


def lines_of(path: Path | str, needs: Sequence[str], torn: bool) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """As `read_rows`, each row with its line as it stands. A line ends at a line feed alone: texts may hold whatever
    else ends lines."""
    path = Path(path)
    if not path.is_file():
        return
    lines = path.read_bytes().split(b"\n")
    last = max((number for number, line in enumerate(lines) if line.strip()), default=-1)
    for number, line in enumerate(lines):
        found = _object(line, needs) if line.strip() else None
        if found is not None:
            yield line, found
        elif line.strip() and not (torn and number == last):
            raise _foreign(path, f"line {number + 1} of {path}", line, needs)


def heal(path: Path | str) -> None:
    """Take half a line off a file's end, so that what is appended begins a line."""
    path = Path(path)
    if path.is_file():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)


def _object(content: bytes, needs: Sequence[str]) -> dict[str, Any] | None:
    try:
        # NaN is a value that was not measured. A byte order mark is what an editor leaves.
        found = json.loads(content.removeprefix(BOM_UTF8).decode("utf-8"), parse_constant=lambda _: None)
    except (ValueError, RecursionError):  # of JSON and of UTF-8
        return None
    return found if isinstance(found, dict) and all(key in found for key in needs) else None


def _foreign(path: Path, where: str, content: bytes, needs: Sequence[str]) -> RunDirectoryError:
    # A compressed file, or one in another encoding, is told from its first bytes, not from those of a line.
    text_of(path.read_bytes(), path, RunDirectoryError)
    text = text_of(content, where, RunDirectoryError)
    with_keys = f" with {', '.join(needs)}" if needs else ""
    return RunDirectoryError(
        f"{where} is {shown(text)}" if text.strip() else f"{where} is empty", f"a JSON object{with_keys}",
        "mend or remove it, or run the command again that wrote it",
    )  # fmt: skip
