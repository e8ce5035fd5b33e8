"""Rows of a task's file as they were written, and files that cannot be read named with the place."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nla_megatron.errors import ColumnError, MissingFile
from nla_megatron.tasks.rows import question_of, read_rows

ENDS = "one\u2028two\u2029three\x85four\x0bfive"


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_only_a_line_feed_ends_a_row(tmp_path: Path, ascii_only: bool, end: str) -> None:
    rows = [{"prompt": ENDS, "other": 1}, {"prompt": "plain", "other": 2}]
    text = end.join(json.dumps(row, ensure_ascii=ascii_only) for row in rows) + end
    (tmp_path / "rows.jsonl").write_bytes(text.encode())
    assert read_rows(tmp_path / "rows.jsonl", ["prompt"]) == [{"prompt": ENDS}, {"prompt": "plain"}]


def test_a_directory_is_all_of_its_files_by_name(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.json").write_text('{"prompt": "three"}')
    (tmp_path / "a.jsonl").write_text('{"prompt": "one"}\n\n{"prompt": "two"}')
    (tmp_path / "notes.txt").write_text("no rows")
    assert [row["prompt"] for row in read_rows(tmp_path, ["prompt"])] == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("rows.jsonl", b'{"prompt": "caf\xe9"}', "UTF-8"),
        ("rows.json", b'{"prompt": "caf\xe9"}', "UTF-8"),
        ("rows.jsonl", b'{"prompt": "a"}\n{"prompt": ', "line 2"),
        ("rows.jsonl", b'{"prompt": "a"}\n["b"]', "line 2"),
        ("rows.jsonl", b'{"text": "a"}', "no column 'prompt'"),
        ("rows.csv", b"prompt\na", "rows.csv"),
        ("rows.parquet", b"no parquet", "not readable"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, named: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ColumnError) as caught:
        read_rows(tmp_path / name, ["prompt"])
    assert named in caught.value.found and name in caught.value.found


def test_nothing_to_read_is_named_by_its_key(tmp_path: Path) -> None:
    with pytest.raises(MissingFile) as caught:
        read_rows(tmp_path, ["prompt"], "held_out")
    assert str(tmp_path) in caught.value.found and caught.value.remedy == "correct held_out="


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_messages_content_may_be_parts_of_text(tmp_path: Path, kind: str) -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "two?"}]
    row = {"prompt": [{"role": "user", "content": parts}]}
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text(json.dumps(row) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist([row]), path)
    assert question_of(read_rows(path, ["prompt"])[0], "prompt").text == "What is two?"


@pytest.mark.parametrize(
    ("part", "found"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "image_url"),
        ({"type": "text", "text": None}, "null"),
        ({"type": "text", "text": "a", "image": "b"}, "image"),
        ("a", "no object"),
        (None, "null"),
    ],
)
def test_a_part_that_is_no_text_is_named(tmp_path: Path, part: object, found: str) -> None:
    row = {"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}, part]}]}
    (tmp_path / "rows.jsonl").write_text("\n" + json.dumps(row))
    with pytest.raises(ColumnError, match=f"(?s)line 2.*{found}|{found}.*line 2"):
        question_of(read_rows(tmp_path / "rows.jsonl", ["prompt"])[0], "prompt")
