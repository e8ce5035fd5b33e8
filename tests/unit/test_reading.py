"""What is no text in UTF-8 is named with its kind and the way out; what is one is read, with marks and blank lines."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nla_megatron.errors import CheckpointError, ColumnError, MissingFile, SidecarError
from nla_megatron.reading import (
    json_lines,
    parquet_columns,
    parquet_schema,
    read_object,
    read_text,
    read_yaml,
    text_value,
)

LINES = '{"a": "é"}\n{"a": "b\u2028c"}\n'


def parquet_bytes() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"a": ["x"]}), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("text", [LINES, LINES.replace("\n", "\r\n"), LINES.replace("\n", "\n\n \n"), LINES + "\n\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_lines_are_read_with_a_mark_carriage_returns_and_blank_lines(tmp_path: Path, text: str, mark: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes((mark + text).encode())
    assert [value["a"] for _, value in json_lines(path)] == ["é", "b\u2028c"]


@pytest.mark.parametrize(
    ("data", "found", "remedy"),
    [
        (LINES.encode("utf-16"), "UTF-16", "iconv -f UTF-16 "),
        (LINES.encode("utf-16-le"), "UTF-16LE", "iconv -f UTF-16LE"),
        (LINES.encode("utf-16-be"), "UTF-16BE", "iconv -f UTF-16BE"),
        (LINES.encode("utf-32"), "UTF-32", "iconv -f UTF-32"),
        (LINES.encode("utf-32-le"), "UTF-32LE", "iconv -f UTF-32LE"),
        (LINES.encode("utf-32-be"), "UTF-32BE", "iconv -f UTF-32BE"),
        ('\n\n{"a": "café"}'.encode("latin-1"), r"byte 0xe9 in line 3", "WINDOWS-1252"),
        (gzip.compress(LINES.encode(), mtime=0), "gzip", "gunzip"),
        (bz2.compress(LINES.encode()), "bzip2", "bunzip2"),
        (lzma.compress(LINES.encode()), "xz", "unxz"),
        (b"\x28\xb5\x2f\xfd" + bytes(8), "zstd", "unzstd"),
        (b"PK\x03\x04" + bytes(8), "zip", "unzip"),
        (parquet_bytes(), "parquet", ".parquet"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer", "git lfs pull"),
        (bytes([0, 200, 3, 255, 0, 1, 254]) * 9, "binary", "the text itself"),
    ],
)
def test_bytes_that_are_no_text_are_named_with_the_way_out(
    tmp_path: Path, data: bytes, found: str, remedy: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    for read, error in (
        (lambda: list(json_lines(path)), ColumnError),
        (lambda: read_yaml(path, SidecarError), SidecarError),
    ):
        with pytest.raises(error, match=f"{path}.*{found}") as caught:
            read()
        assert remedy in caught.value.remedy and str(path) in caught.value.remedy


@pytest.mark.parametrize("content", ["", "\ufeff", "{", "[1]", "null", "{'a': 1}", "[" * 100_000])
def test_a_configuration_that_is_no_object_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=str(path)):
        read_object(path, CheckpointError)


def test_a_line_that_is_no_json_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": ')
    with pytest.raises(ColumnError, match=f"line 3 of {path}"):
        list(json_lines(path))


@pytest.mark.parametrize(
    "data", [b"", b'{"a": 1}', gzip.compress(b"x", mtime=0), b"PAR1 cut", b"\xff\xfea\x00", bytes(99)]
)
def test_what_is_no_parquet_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(data)
    with pytest.raises(ColumnError, match=f"{path} is .*readable"):
        parquet_schema(path)


def test_two_columns_of_one_name_are_named(tmp_path: Path) -> None:
    text = pa.array(["x"])
    pq.write_table(pa.Table.from_arrays([text, text], names=["text", "text"]), tmp_path / "rows.parquet")
    with pytest.raises(ColumnError, match="several columns 'text'"):
        parquet_schema(tmp_path / "rows.parquet")


def test_a_mark_that_other_libraries_refuse_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8-sig")
    assert read_object(tmp_path / "config.json") == {}
    with pytest.raises(CheckpointError, match="byte order mark"):
        read_object(tmp_path / "config.json", CheckpointError, mark=False)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(MissingFile, match=str(path)):
            read_text(path)
        with pytest.raises(MissingFile, match=str(path)):
            parquet_schema(path)


def test_a_string_of_a_table_that_is_no_utf8_is_named_by_its_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    texts = pa.array([b"fine", b"half \xed\xa0\xbd an emoji"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": texts}), path)
    with pytest.raises(ColumnError, match=f"'text' in row 1 of {path}"):
        parquet_columns(path, ["text"])


@pytest.mark.parametrize("value", [None, 3, 2.5, True, ["a"], {"a": 1}, b"a"])
def test_a_value_that_is_no_text_is_named_and_never_made_one(value: object) -> None:
    with pytest.raises(ColumnError, match=r"'text' in line 4 of x is (null|3|2.5|True|\[|\{|b)"):
        text_value(value, "line 4 of x", "text")


@pytest.mark.parametrize("value", ["a \ud83d b", "\udc00", "é\ud800"])
def test_half_a_character_is_named(value: str) -> None:
    with pytest.raises(ColumnError, match="'text' in line 4 of x has half of a surrogate pair"):
        text_value(value, "line 4 of x", "text")
    assert text_value("a \U0001f600 b", "line 4 of x", "text") == "a \U0001f600 b"
