"""A corpus: documents with an id and a text, from parquet or JSON lines."""

from __future__ import annotations

import json
from pathlib import Path

from nla_megatron.errors import ColumnError, MissingFile


def read_corpus(path: str | Path) -> list[tuple[str, str]]:
    """(doc_id, text) of every document, in file order. Raises MissingFile, ColumnError."""
    path = Path(path)
    if not path.is_file():
        raise MissingFile(f"no {path}", "a .parquet or .jsonl file of documents", "correct corpus=")
    rows = _parquet(path) if path.suffix == ".parquet" else _json_lines(path)
    seen: set[str] = set()
    for doc_id, _ in rows:
        if doc_id in seen:
            raise ColumnError(
                f"doc_id {doc_id!r} twice in {path}", "one row per document", "give every document its own id"
            )
        seen.add(doc_id)
    return rows


def _parquet(path: Path) -> list[tuple[str, str]]:
    import pyarrow.parquet as pq

    found = pq.read_schema(path).names
    _require(found, path)
    table = pq.read_table(path, columns=["doc_id", "text"])
    return list(zip(table["doc_id"].to_pylist(), table["text"].to_pylist(), strict=True))


def _json_lines(path: Path) -> list[tuple[str, str]]:
    rows = []
    with path.open() as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ColumnError(
                    f"line {number} of {path}: {error}", "one JSON object per line", "correct the file"
                ) from None
            _require(list(row), path)
            rows.append((row["doc_id"], row["text"]))
    return rows


def _require(found: list[str], path: Path) -> None:
    for name in ("doc_id", "text"):
        if name not in found:
            raise ColumnError(
                f"no column {name!r} in {path}, only {', '.join(found)}",
                "columns doc_id and text",
                "rename the columns",
            )
