"""Rows of a text task's file: parquet, JSON lines or JSON, on this machine or on the Hugging Face hub."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nla_megatron.errors import ColumnError, ConfigError, MissingFile

Row = dict[str, Any]
SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".json")
_SHARD = r"(?:-\d+-of-\d+)?\.parquet"


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
        files = sorted(each for each in path.rglob("*") if each.suffix in SUFFIXES)
    else:
        files = [path] if path.is_file() else []
    if not files:
        found = f"no {', '.join(SUFFIXES)} in {path}" if path.is_dir() else f"no {path}"
        raise MissingFile(found, f"a file of rows with {', '.join(columns)}", f"correct {key}=")
    return [row for file in files for row in _read(file, columns)]


def _read(path: Path, columns: Sequence[str]) -> list[Row]:
    if path.suffix == ".parquet":
        return _parquet(path, columns)
    if path.suffix == ".json":
        return _json(path, columns)
    if path.suffix not in SUFFIXES:
        raise ColumnError(f"{path}", f"a file that ends in {', '.join(SUFFIXES)}", "convert or rename the file")
    rows = []
    # Texts may hold whatever else ends lines, so that only a line feed ends a row.
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            rows.append(_picked(_parsed(line, f"line {number} of {path}"), columns, f"line {number} of {path}"))
    return rows


def _parquet(path: Path, columns: Sequence[str]) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(path).names
        _picked(dict.fromkeys(names), columns, str(path))
        rows: list[Row] = pq.read_table(path, columns=list(columns)).to_pylist()
        return rows
    except pa.ArrowInvalid as error:
        raise ColumnError(f"{path} is not readable: {error}", "a parquet file", "copy the file again") from error


def _json(path: Path, columns: Sequence[str]) -> list[Row]:
    """One object, as Hendrycks' files are, or a list of them."""
    content = _parsed(_text(path), str(path))
    rows = content if isinstance(content, list) else [content]
    return [_picked(row, columns, str(path)) for row in rows]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ColumnError(f"{path}: {error}", "a text in UTF-8", "convert the file to UTF-8") from None


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ColumnError(f"{where}: {error}", "JSON", "correct the file") from None


def _picked(row: Any, columns: Sequence[str], where: str) -> Row:
    if not isinstance(row, dict):
        raise ColumnError(f"{where} is no object", "one JSON object per row", "correct the file")
    for name in columns:
        if name not in row:
            raise ColumnError(
                f"no column {name!r} in {where}, only {', '.join(row)}", f"columns {', '.join(columns)}",
                "rename the columns, or name them in the task's options",
            )  # fmt: skip
    return {name: row[name] for name in columns}


def hub_files(repository: str, split: str, subset: str = "", revision: str | None = None) -> list[Path]:
    """Local paths of a split's parquet files of a data set on the hub; downloaded where the cache lacks them.

    Raises:
        MissingFile: no such data set, subset or split; or it is not in the cache and the hub cannot be reached.
        ConfigError: `repository` is no name of the hub.
    """
    from huggingface_hub import HfApi, errors, hf_hub_download

    remedy = "download its parquet file on a machine with a network and give its path"
    try:
        cached = _cached(repository, split, subset, revision)
        if cached:
            return cached
        names = HfApi().list_repo_files(repository, repo_type="dataset", revision=revision)
        chosen = _of_split(names, split, subset)
        if not chosen:
            raise MissingFile(
                f"no parquet files of split {split!r} in {repository} ({subset or 'any subset'})",
                f"some of {', '.join(name for name in names if name.endswith('.parquet')) or 'no parquet files'}",
                "correct split= or subset=",
            )
        return [
            Path(hf_hub_download(repository, name, repo_type="dataset", revision=revision)) for name in sorted(chosen)
        ]
    except errors.HFValidationError as error:
        raise ConfigError(f"hub={repository!r}: {error}", "owner/name", "correct hub=") from error
    # The library's own refusals, and those of the HTTP client that it was built on, whichever that is.
    except (errors.HTTPError, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        found = f"the data set {repository} cannot be fetched: {str(error).splitlines()[0]}"
        raise MissingFile(found, "a data set of the Hugging Face hub, or its copy in the cache", remedy) from error


def _cached(repository: str, split: str, subset: str, revision: str | None) -> list[Path]:
    """The split's files of a snapshot that is on this machine already, so that a resume needs no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    held: str | None
    try:
        held = snapshot_download(repository, repo_type="dataset", revision=revision, local_files_only=True)
    except LocalEntryNotFoundError as error:
        # A snapshot of which only some files were asked for may well hold all of this split's.
        held = getattr(error, "snapshot_path", None)
    if held is None:
        return []
    root = Path(held)
    names = [str(path.relative_to(root)) for path in root.rglob("*.parquet")]
    chosen = [root / name for name in sorted(_of_split(names, split, subset))]
    # A download that was cut short left some shards only.
    counts = {int(found[1]) for path in chosen if (found := re.search(r"-of-(\d+)\.parquet$", path.name))}
    return chosen if not counts or counts == {len(chosen)} else []


def _of_split(names: Sequence[str], split: str, subset: str) -> list[str]:
    folder = f"(?:.*/)?{re.escape(subset)}/" if subset else "(?:.*/)?"
    return [name for name in names if re.fullmatch(f"{folder}{re.escape(split)}{_SHARD}", name)]
