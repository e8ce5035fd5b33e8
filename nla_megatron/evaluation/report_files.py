"""The files of a run that its report is made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nla_megatron.contract.journal import Row, read_object, read_rows


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
    summary = read_object(run_dir / "summary.json")
    return RunFiles(
        name=str(summary.get("run_name") or run_dir.resolve().name),
        summary=summary,
        rl=read_rows(run_dir / "rl" / "metrics.jsonl", torn=True),
        sft_av=read_rows(run_dir / "sft_av" / "metrics.jsonl", torn=True),
        sft_ar=read_rows(run_dir / "sft_ar" / "metrics.jsonl", torn=True),
        pretrain=read_rows(run_dir / "pretrain" / "metrics.jsonl", torn=True),
        examples=read_rows(run_dir / "eval" / "examples.jsonl", torn=True),
    )
