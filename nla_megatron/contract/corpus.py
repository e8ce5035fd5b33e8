"""A corpus: documents with an id and a text, from parquet or JSON lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nla_megatron.errors import ColumnError, MissingFile
from nla_megatron.hub import files_at
from nla_megatron.reading import json_objects, parquet_columns, parquet_schema, text_value

_COLUMNS = ("doc_id", "text")


def read_corpus(path: str | Path) -> list[tuple[str, str]]:
    """(doc_id, text) of every document, in file order. Raises MissingFile, ColumnError."""
    files = files_at(path)
    if not files:
        raise MissingFile(f"no {path}", "a .parquet or .jsonl file of documents", "correct corpus=")
    rows = [row for file in files for row in _rows(file)]
    if not rows:
        raise ColumnError(f"no document in {path}", "one row per document", "give a corpus that has some")
    seen: set[str] = set()
    for doc_id, _ in rows:
        if doc_id in seen:
            raise ColumnError(
                f"doc_id {doc_id!r} twice in {path}", "one row per document", "give every document its own id"
            )
        seen.add(doc_id)
    return rows


def _rows(path: Path) -> Iterator[tuple[str, str]]:
    for where, doc_id, text in _parquet(path) if path.suffix == ".parquet" else _json_lines(path):
        yield text_value(doc_id, where, "doc_id", blank=False), text_value(text, where, "text")


def _parquet(path: Path) -> Iterator[tuple[str, Any, Any]]:
    _require(parquet_schema(path).names, str(path))
    found = parquet_columns(path, _COLUMNS)
    for row, (doc_id, text) in enumerate(zip(found["doc_id"], found["text"], strict=True)):
        yield f"row {row} of {path}", doc_id, text


def _json_lines(path: Path) -> Iterator[tuple[str, Any, Any]]:
    for number, row in json_objects(path):
        where = f"line {number} of {path}"
        _require(list(row), where)
        yield where, row["doc_id"], row["text"]


def _require(found: list[str], where: str) -> None:
    for name in _COLUMNS:
        if name not in found:
            raise ColumnError(
                f"no column {name!r} in {where}, only {', '.join(found) or 'none'}",
                "columns doc_id and text",
                "rename the columns",
            )
