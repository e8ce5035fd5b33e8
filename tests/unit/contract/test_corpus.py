"""A corpus is texts by id; whatever is none of these is named with its file and its line or row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nla_megatron.contract.corpus import read_corpus
from nla_megatron.errors import ColumnError, MissingFile

GOOD = [{"doc_id": "a", "text": "One."}, {"doc_id": "b", "text": ""}]


def written(path: Path, rows: list[Any]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8-sig")
    return path


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.parquet"])
def test_documents_are_read_in_order(tmp_path: Path, name: str) -> None:
    assert read_corpus(written(tmp_path / name, GOOD)) == [("a", "One."), ("b", "")]


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"doc_id": "c", "text": None}, "'text' in line 3 of .* is null"),
        ({"doc_id": "c", "text": 12345}, "'text' in line 3 of .* is 12345"),
        ({"doc_id": "c", "text": ["a"]}, "'text' in line 3"),
        ({"doc_id": "c", "text": "half \ud83d here"}, "'text' in line 3 of .* surrogate"),
        ({"doc_id": 7, "text": "x"}, "'doc_id' in line 3 of .* is 7"),
        ({"doc_id": None, "text": "x"}, "'doc_id' in line 3 of .* is null"),
        ({"doc_id": " ", "text": "x"}, "'doc_id' in line 3"),
        ({"doc_id": "a", "text": "x"}, "'a' twice"),
        ({"doc_id": "c"}, "no column 'text' in line 3"),
        (["c", "x"], "line 3 of .* is no object"),
        (12, "line 3 of .* is no object but 12"),
    ],
)
def test_a_document_that_is_none_is_named_by_its_line(tmp_path: Path, row: Any, found: str) -> None:
    with pytest.raises(ColumnError, match=found):
        read_corpus(written(tmp_path / "corpus.jsonl", [*GOOD, row]))


@pytest.mark.parametrize(("text", "found"), [([None], "row 2 of .* is null"), ([[1]], "")])
def test_a_null_in_a_table_is_named_by_its_row(tmp_path: Path, text: list[Any], found: str) -> None:
    rows = [*GOOD, {"doc_id": "c", "text": None}] if text == [None] else [{"doc_id": "c", "text": 3}]
    with pytest.raises(ColumnError, match=found or "row 0 of .* is 3"):
        read_corpus(written(tmp_path / "corpus.parquet", rows))


def test_a_pattern_is_all_of_its_files_and_nothing_is_no_corpus(tmp_path: Path) -> None:
    written(tmp_path / "b-1.jsonl", GOOD[1:])
    written(tmp_path / "b-0.jsonl", GOOD[:1])
    assert [doc for doc, _ in read_corpus(tmp_path / "b-*.jsonl")] == ["a", "b"]
    with pytest.raises(MissingFile):
        read_corpus(tmp_path / "c-*.jsonl")
    (tmp_path / "none.jsonl").write_text("\n\n")
    with pytest.raises(ColumnError, match="no document"):
        read_corpus(tmp_path / "none.jsonl")
