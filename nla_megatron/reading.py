"""Files that people bring: their bytes as text, JSON, YAML or parquet, and what is no text named with its place.

Every reader of a file that somebody else may have written asks here, so that a byte order mark, another encoding, a
compressed file or a null is the same to all of them. Errors are of the class that the reader names.
"""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nla_megatron.errors import ColumnError, MissingFile, NlaError

if TYPE_CHECKING:
    import pyarrow as pa

# First bytes, what they are of, what makes a text (or the right kind of file) of it.
_KINDS = (
    # From standard input, because these programs refuse names without an end of theirs.
    (b"\x1f\x8b", "gzip", "unpack it: gunzip <"),
    (b"\x28\xb5\x2f\xfd", "zstd", "unpack it: unzstd <"),
    (b"BZh", "bzip2", "unpack it: bunzip2 <"),
    (b"\xfd7zXZ\x00", "xz", "unpack it: unxz <"),
    (b"\x04\x22\x4d\x18", "lz4", "unpack it: unlz4 <"),
    (b"PK\x03\x04", "zip", "unpack it: unzip"),
    (b"PAR1", "parquet", "give it a name that ends in .parquet:"),
    (b"ARROW1", "Arrow", "write it as parquet:"),
    (b"\x89HDF", "HDF5", "write it as parquet or JSON lines:"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "run `git lfs pull` for"),
    (b"\xff\xfe\x00\x00", "UTF-32", "convert it: iconv -f UTF-32 -t UTF-8"),
    (b"\x00\x00\xfe\xff", "UTF-32", "convert it: iconv -f UTF-32 -t UTF-8"),
    (b"\xff\xfe", "UTF-16", "convert it: iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16", "convert it: iconv -f UTF-16 -t UTF-8"),
)
_SHOWN = 60
_LOOKED_AT = 4096


def read_text(path: Path | str, error: type[NlaError] = ColumnError) -> str:
    """A file's text, without a byte order mark. Raises MissingFile, or `error` where it is no UTF-8."""
    return text_of(read_bytes(path), path, error)


def read_bytes(path: Path | str) -> bytes:
    """A file's bytes. Raises MissingFile."""
    try:
        return Path(path).read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise MissingFile(f"no file {path}", "a file that is there", "correct the path") from None
    except OSError as reason:
        found = f"{path} cannot be read: {reason.strerror or reason}"
        raise MissingFile(found, "a file that may be read", "change its permissions, or give another path") from None


def text_of(data: bytes, path: Path | str, error: type[NlaError] = ColumnError) -> str:
    """The text that bytes are, without a byte order mark.

    Raises:
        error: they are no UTF-8: what they look like, and how to convert them.
    """
    kind = kind_of(data)
    if kind is None:
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as reason:
            at = reason.start
            if data.count(0, 0, _LOOKED_AT):
                kind = "binary, no text", "give the text itself in place of"
            else:
                found = (
                    f"in another encoding than UTF-8, with byte 0x{data[at]:02x} in line {data.count(10, 0, at) + 1}"
                )
                kind = f"{found} (Latin-1 or Windows-1252 perhaps)", "convert it: iconv -f WINDOWS-1252 -t UTF-8"
    what, remedy = kind
    raise error(f"{path} is {what}", "a text in UTF-8", f"{remedy} {path}")


def kind_of(data: bytes) -> tuple[str, str] | None:
    """What bytes that cannot be a text in UTF-8 are, and what makes one of them."""
    for start, what, remedy in _KINDS:
        if data.startswith(start):
            return what, remedy
    # Without a mark, UTF-16 of mostly Latin letters has a zero in every second byte.
    head = data[:_LOOKED_AT]
    for zeros, what in (((2, 3), "UTF-32LE"), ((0, 1), "UTF-32BE")):
        if len(head) > 7 and not any(any(head[at::4]) for at in zeros) and any(head):
            return f"{what} without a byte order mark", f"convert it: iconv -f {what} -t UTF-8"
    for first, what in ((1, "UTF-16LE"), (0, "UTF-16BE")):
        if len(head) > 3 and head[first::2].count(0) > 0.4 * len(head) / 2 and not head[1 - first :: 2].count(0):
            return f"{what} without a byte order mark", f"convert it: iconv -f {what} -t UTF-8"
    return None


def read_json(path: Path | str, error: type[NlaError] = ColumnError, remedy: str = "write the file again") -> Any:
    """The one value that a file holds. Raises MissingFile, or `error` where it is no JSON."""
    return parsed(read_text(path, error), str(path), error, remedy)


def read_object(
    path: Path | str, error: type[NlaError] = ColumnError, remedy: str = "write the file again", mark: bool = True
) -> dict[str, Any]:
    """The one object that a file holds. Raises MissingFile, or `error` where it holds anything else.

    Args:
        mark: whether a byte order mark may stand before it. Libraries that read the same file may refuse one.
    """
    data = read_bytes(path)
    if not mark and data.startswith(BOM_UTF8):
        raise error(
            f"{path} begins with a byte order mark", "JSON, as transformers reads it",
            f"take the mark off: sed -i '1s/^\\xEF\\xBB\\xBF//' {path}",
        )  # fmt: skip
    return object_of(parsed(text_of(data, path, error), str(path), error, remedy), str(path), error, remedy)


def json_lines(
    path: Path | str, error: type[NlaError] = ColumnError, remedy: str = "correct the file"
) -> Iterator[tuple[int, Any]]:
    """(line from 1 on, value) of each line that is not blank.

    Texts may hold whatever else ends lines, so that a line feed alone ends one.

    Raises:
        MissingFile, or `error` with the line that is no JSON.
    """
    for number, line in enumerate(read_text(path, error).split("\n"), 1):
        if line.strip():
            yield number, parsed(line, f"line {number} of {path}", error, remedy)


def json_objects(
    path: Path | str, error: type[NlaError] = ColumnError, remedy: str = "correct the file"
) -> Iterator[tuple[int, dict[str, Any]]]:
    """As `json_lines`, of objects alone; raises `error` also for a line that is anything else."""
    for number, value in json_lines(path, error, remedy):
        yield number, object_of(value, f"line {number} of {path}", error, remedy)


def parsed(text: str, where: str, error: type[NlaError] = ColumnError, remedy: str = "correct the file") -> Any:
    """The value of a JSON text. Raises `error`."""
    if not text.strip():
        raise error(f"{where} is empty", "JSON", remedy)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as reason:
        raise error(f"{where} is no JSON: {reason}; it begins with {text[:_SHOWN]!r}", "JSON", remedy) from None


def object_of(value: Any, where: str, error: type[NlaError] = ColumnError, remedy: str = "correct the file") -> Any:
    """The value, which is a JSON object. Raises `error`."""
    if not isinstance(value, dict):
        raise error(f"{where} is no object but {shown(value)}", "a JSON object", remedy)
    return value


def read_yaml(path: Path | str, error: type[NlaError], remedy: str = "write the file again") -> Any:
    """What a YAML file holds. Raises MissingFile, or `error` where it is no YAML."""
    import yaml

    text = read_text(path, error)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as reason:
        raise error(f"{path} is not readable YAML: {reason}", "YAML", remedy) from None


def parquet_schema(path: Path | str) -> pa.Schema:
    """The columns of a parquet file. Raises MissingFile, and ColumnError where it is none or two have one name."""
    import pyarrow.parquet as pq

    if not Path(path).is_file():
        raise MissingFile(f"no file {path}", "a parquet file", "correct the path")
    with parquet_errors(path):
        schema = pq.read_schema(path)
    if twice := [name for name, count in Counter(schema.names).items() if count > 1]:
        raise ColumnError(
            f"{path} has several columns {twice[0]!r}", "one column of a name", "drop or rename all but one"
        )
    return schema


@contextmanager
def parquet_errors(path: Path | str) -> Iterator[None]:
    """Inside, whatever is wrong with the bytes of a parquet file raises ColumnError; what a disk refuses stays."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as reason:
        if getattr(reason, "errno", None) is not None:
            raise
        raise _no_parquet(path, reason) from None


def parquet_columns(path: Path | str, names: Iterable[str]) -> dict[str, list[Any]]:
    """Columns of a parquet file as Python objects. Raises as `parquet_schema`, and where a string is no UTF-8."""
    import pyarrow.parquet as pq

    with parquet_errors(path):
        table = pq.read_table(Path(path), columns=list(names))
    return {name: python_values(table[name], name, path) for name in names}


def python_values(column: Any, name: str, path: Path | str) -> list[Any]:
    """A column's values. Raises ColumnError with the row of a string that is no UTF-8."""
    try:
        values: list[Any] = column.to_pylist()
        return values
    except UnicodeDecodeError:
        for row, value in enumerate(column):
            try:
                value.as_py()
            except UnicodeDecodeError as reason:
                raise ColumnError(
                    f"{name!r} in row {row} of {path} is no UTF-8: {reason.object[:_SHOWN]!r}", "a text in UTF-8",
                    "write the table again from valid text",
                ) from None  # fmt: skip
        raise


def _no_parquet(path: Path | str, reason: Exception) -> ColumnError:
    with Path(path).open("rb") as file:
        head = file.read(_LOOKED_AT)
    if not head:
        return ColumnError(f"{path} is empty, not readable", "a parquet file", "write it again")
    if head.startswith(b"PAR1"):
        told = f"{path} is not readable: {' '.join(str(reason).split())}"
        return ColumnError(told, "a parquet file", "write it again; it may have been cut short while it was copied")
    kind = kind_of(head)
    what = kind[0] if kind else "a text" if head[:1] in (b"{", b"[") or head.isascii() else "no parquet"
    remedy = "give a text of JSON lines a name that ends in .jsonl" if kind is None else f"{kind[1]} {path}"
    return ColumnError(f"{path} is not readable: it is {what}, beginning with {head[:20]!r}", "a parquet file", remedy)


def text_value(value: Any, where: str, name: str, blank: bool = True) -> str:
    """A value of a row that is a text.

    Args:
        where: the row, as in "line 3 of corpus.jsonl".
        name: the column.
        blank: whether it may be empty.

    Raises:
        ColumnError: null, a number, a list, anything else; half of a surrogate pair, which is no character.
    """
    remedy = f"correct or remove this row, or name another column than {name!r}"
    if not isinstance(value, str):
        raise ColumnError(f"{name!r} in {where} is {shown(value)}", "a text", remedy)
    if not blank and not value.strip():
        raise ColumnError(f"{name!r} in {where} is {value!r}", "a text that is not blank", remedy)
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as reason:
            around = value[max(reason.start - 20, 0) : reason.start + 20]
            raise ColumnError(
                f"{name!r} in {where} has half of a surrogate pair, {value[reason.start]!r}, in {around!r}",
                "whole characters, as UTF-8 has them", "write the whole character, or take it out",
            ) from None  # fmt: skip
    return value


def shown(value: Any) -> str:
    """A value as a message quotes it: null as files call it, a long one cut."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
