"""Rows of a text task's file: parquet, JSON lines or JSON, on this machine or on the Hugging Face hub."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from nla_megatron.errors import ColumnError, MissingFile
from nla_megatron.hub import files_at
from nla_megatron.reading import json_objects, object_of, parquet_columns, parquet_schema, read_json, shown, text_value

SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".json")
_ROLES = ("system", "user", "assistant")


class Row(dict[str, Any]):
    """The values of a row by column, and where it stands: `file`, and `number` there, of a line from 1 on, of any
    other row from 0 on.
    """

    def __init__(self, values: Mapping[str, Any], file: Path, number: int, unit: str):
        super().__init__(values)
        self.file, self.number, self.unit = file, number, unit

    @property
    def where(self) -> str:
        return f"{self.unit} {self.number} of {self.file}"

    @property
    def place(self) -> dict[str, Any]:
        """The same for a record: which file, and which line or row of it."""
        return {"file": str(self.file), self.unit if self.unit == "line" else "file_row": self.number}

    def text(self, name: str, blank: bool = True) -> str:
        """A value that is a text. Raises ColumnError."""
        return text_value(self[name], self.where, name, blank)


@dataclass(frozen=True)
class Question:
    """What a model is asked: the user's `text`, and the (role, content) of what was said before."""

    text: str
    before: tuple[tuple[str, str], ...] = ()


def question_of(row: Row, name: str) -> Question:
    """A question: a text, or a list of messages that ends with the user's. Raises ColumnError for anything else."""
    value = row[name]
    if not isinstance(value, list):
        return Question(row.text(name, blank=False))
    turns = [_turn(message, f"{row.where}, message {number}", name) for number, message in enumerate(value)]
    roles = [role for role, _ in turns]
    if not turns or roles[-1] != "user" or "system" in roles[1:]:
        raise ColumnError(
            f"{name!r} in {row.where} has messages of {', '.join(roles) or 'nobody'}",
            "messages of system (first, if at all), user and assistant, of which the last is the user's",
            "leave the answer out of the question's column",
        )  # fmt: skip
    return Question(turns[-1][1], tuple(turns[:-1]))


def _turn(message: Any, where: str, name: str) -> tuple[str, str]:
    message = object_of(message, f"{name!r} in {where}", ColumnError, "write {role, content} for each message")
    more = sorted(key for key, value in message.items() if key not in ("role", "content") and value is not None)
    if message.get("role") not in _ROLES or more:
        found = f"a key {more[0]!r}" if more else f"the role {shown(message.get('role'))}"
        raise ColumnError(
            f"{name!r} in {where} has {found}", f"role ({', '.join(_ROLES)}) and content", "correct the row"
        )
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in content)
    return message["role"], text_value(content, where, "content", blank=False)


def _part(part: Any, where: str) -> str:
    """One of the parts that a message's content may be given in: a text. Raises ColumnError for a picture, say."""
    part = object_of(part, f"'content' in {where}", ColumnError, "write {type: text, text} for each part")
    more = sorted(key for key, value in part.items() if key not in ("type", "text") and value is not None)
    if part.get("type") != "text" or more:
        found = f"a key {more[0]!r}" if part.get("type") == "text" else f"of type {shown(part.get('type'))}"
        raise ColumnError(f"'content' in {where} has a part {found}", "parts of text alone", "leave these rows out")
    return text_value(part.get("text"), where, "text")


def reference_of(row: Row, name: str, bare: bool) -> tuple[str | None, bool]:
    """What the answer is compared with, None for null, and whether it is the answer alone.

    A mapping is read by its `ground_truth`, which is the answer alone.

    Args:
        bare: whether the column holds answers alone, which may then be numbers.

    Raises:
        ColumnError: anything else.
    """
    value = row[name]
    if isinstance(value, Mapping):
        if "ground_truth" not in value:
            raise ColumnError(
                f"{name!r} in {row.where} is {shown(value)}", "a text, or a mapping with ground_truth",
                "write the answer itself into this column",
            )  # fmt: skip
        value, bare = value["ground_truth"], True
    if value is None:
        return None, bare
    number = isinstance(value, int | float | Decimal) and not isinstance(value, bool) and math.isfinite(value)
    return (str(value) if bare and number else text_value(value, row.where, name)), bare


def read_rows(path: str | Path, columns: Sequence[str], key: str = "data") -> list[Row]:
    """The named columns of every row, in file order; a directory is all of its files, by name.

    Args:
        key: of the configuration, for messages.

    Raises:
        MissingFile: nothing there, or a directory without such files.
        ColumnError: a file that cannot be read, or lacks a column.
    """
    path = Path(path)
    if path.is_dir():
        found = (each.relative_to(path) for each in path.rglob("*") if each.suffix in SUFFIXES and each.is_file())
        # Hidden files are the copies and notes of other programs.
        files = sorted(path / each for each in found if not any(part.startswith(".") for part in each.parts))
    else:
        files = files_at(path)
    if not files:
        missing = f"no {', '.join(SUFFIXES)} in {path}" if path.is_dir() else f"no {path}"
        raise MissingFile(missing, f"a file of rows with {', '.join(columns)}", f"correct {key}=")
    return [row for file in files for row in _read(file, columns)]


def _read(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    if path.suffix not in SUFFIXES:
        raise ColumnError(f"{path}", f"a file that ends in {', '.join(SUFFIXES)}", "convert or rename the file")
    if path.suffix == ".parquet":
        _check(parquet_schema(path).names, columns, str(path))
        values = parquet_columns(path, columns)
        for number, row in enumerate(zip(*(values[name] for name in columns), strict=True)):
            yield Row(dict(zip(columns, row, strict=True)), path, number, "row")
        return
    unit = "row" if path.suffix == ".json" else "line"
    for number, found in _objects(path) if path.suffix == ".json" else json_objects(path):
        _check(list(found), columns, f"{unit} {number} of {path}")
        yield Row({name: found[name] for name in columns}, path, number, unit)


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """One object, as Hendrycks' files are, or a list of them."""
    content = read_json(path)
    for number, row in enumerate(content if isinstance(content, list) else [content]):
        yield number, object_of(row, f"row {number} of {path}")


def _check(found: Sequence[str], columns: Sequence[str], where: str) -> None:
    for name in columns:
        if name not in found:
            raise ColumnError(
                f"no column {name!r} in {where}, only {', '.join(found) or 'none'}", f"columns {', '.join(columns)}",
                "rename the columns, or name them in the task's options",
            )  # fmt: skip
