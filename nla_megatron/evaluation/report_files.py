"""The files of a run that its report is made from."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nla_megatron.errors import MissingFile, RunDirectoryError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """What a run left to report on; tables that are not there are empty.

    `summary` is `summary.json`; a row of `rl`, `sft_av`, `sft_ar` and `pretrain` is a line of that stage's
    `metrics.jsonl`, with null for a number that was not finite; a row of `examples` is a line of `eval/examples.jsonl`.
    """

    name: str
    summary: Row
    rl: Sequence[Row]
    sft_av: Sequence[Row]
    sft_ar: Sequence[Row]
    pretrain: Sequence[Row]
    examples: Sequence[Row]


def read_run(run_dir: Path) -> RunFiles:
    """Read the files of a run.

    Raises:
        MissingFile: there is no `summary.json`; every other file may be absent.
        RunDirectoryError: a file holds something other than JSON objects.
    """
    path = run_dir / "summary.json"
    if not path.is_file():
        raise MissingFile(
            f"no file at '{path}'",
            "the summary a run writes when it ends",
            "finish the run, or name its output directory",
        )
    summary = _parse(path, path.read_bytes())
    return RunFiles(
        name=str(summary.get("run_name") or run_dir.resolve().name),
        summary=summary,
        rl=read_table(run_dir / "rl" / "metrics.jsonl"),
        sft_av=read_table(run_dir / "sft_av" / "metrics.jsonl"),
        sft_ar=read_table(run_dir / "sft_ar" / "metrics.jsonl"),
        pretrain=read_table(run_dir / "pretrain" / "metrics.jsonl"),
        examples=read_table(run_dir / "eval" / "examples.jsonl"),
    )


def read_table(path: Path) -> list[Row]:
    """The lines of a JSONL file, without one that a kill has torn; none where there is no file."""
    if not path.is_file():
        return []
    *lines, rest = path.read_bytes().split(b"\n")
    if _is_object(rest):  # else it is empty, or a line torn by a kill
        lines.append(rest)
    return [_parse(path, line) for line in lines if line.strip()]


def _parse(path: Path, text: bytes) -> Row:
    if not _is_object(text):
        raise RunDirectoryError(
            f"'{path}' holds {text[:60]!r}", "a JSON object", "write the file again by running its stage"
        )
    # NaN is a value that was not measured.
    record: Row = json.loads(text.removeprefix(BOM_UTF8), parse_constant=lambda _: None)
    return record


def _is_object(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text.removeprefix(BOM_UTF8)), dict)
    except ValueError:  # of JSON and of UTF-8
        return False
