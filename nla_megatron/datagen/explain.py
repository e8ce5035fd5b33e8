"""`explain`: gold explanations for the rows of a base table, by whichever provider.

Finished explanations are appended to `explanations.jsonl` as they come, so a stage that was killed or stopped by its
provider goes on where it was, and nothing paid for is lost.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nla_megatron.config.run_directory import check_run_directory, claim_run_directory, mark_done
from nla_megatron.config.schema import ExplainConfig
from nla_megatron.contract import columns
from nla_megatron.contract.blocks import ApiSummaries
from nla_megatron.contract.journal import heal, read_rows
from nla_megatron.contract.prompts import bare_explanation
from nla_megatron.contract.sidecar import read_dataset_sidecar, write_dataset_sidecar
from nla_megatron.contract.tables import Table, write_table
from nla_megatron.datagen.providers import ExplainRequest, make_provider
from nla_megatron.errors import MissingFile, ProviderError, RunDirectoryError
from nla_megatron.parallel.progress import progress
from nla_megatron.reading import shown
from nla_megatron.tasks.nla_checks import check_stack

TABLE = "explained.parquet"
_JOURNAL = "explanations.jsonl"
_ROWS_PER_BATCH = 4096
_TOLD_LENGTH = 200


def check(config: ExplainConfig, world_size: int) -> None:
    """Everything that can be known before the first request; raises a named error."""
    if not Path(config.input).is_file():
        raise MissingFile(
            f"no {config.input}",
            "the base table that `extract` writes",
            "run `nla-megatron extract`, or correct input=",
        )
    pool, table = read_dataset_sidecar(config.input).pool, Table.open(config.input, "base")
    check_stack(table, pool)
    check_vectors(table)
    for name in (columns.TEXT, columns.DOC_ID):
        table.column(name)
    make_provider(config.provider.name, **config.provider.options)
    check_run_directory("explain", config)


def check_vectors(table: Table) -> None:
    """Raises ColumnError where a row's vectors are not finite: no explanation of it would be of use."""
    for start in range(0, table.n_rows, _ROWS_PER_BATCH):
        rows = range(start, min(start + _ROWS_PER_BATCH, table.n_rows))
        table.vectors(rows)
        table.preceding(rows)


def run(config: ExplainConfig) -> None:
    claim_run_directory("explain", config)
    base = Table.open(config.input, "base")
    texts, doc_ids = base.column(columns.TEXT), base.column(columns.DOC_ID)
    provider = make_provider(config.provider.name, **config.provider.options)
    provider.fit(documents(texts, doc_ids))
    explained = _explain(config, provider, texts)
    kept = sorted(explained)
    out = Path(config.out) / TABLE
    schema = columns.schema("explained", base.d_model, None if base.varies else base.positions)
    rows = write_table(out, _batches(base, kept, explained), schema)
    source = read_dataset_sidecar(config.input)
    write_dataset_sidecar(
        out,
        replace(
            source, row_count=rows, dataset_id="", parent_datasets=(source.dataset_id,), created_at="", git_commit="",
            api_summaries=ApiSummaries(**provider.summary()),
        ),
    )  # fmt: skip
    mark_done(config)


def documents(texts: Sequence[str], doc_ids: Sequence[str]) -> list[str]:
    """The text of each document as far as the table holds it: of its nested prefixes, the longest of every window."""
    parts: dict[str, list[str]] = {}
    for index, (text, doc_id) in enumerate(zip(texts, doc_ids, strict=True)):
        last = index + 1 == len(texts) or doc_ids[index + 1] != doc_id or not texts[index + 1].startswith(text)
        if last:
            parts.setdefault(doc_id, []).append(text)
    return ["\n".join(windows) for windows in parts.values()]


def _explain(config: ExplainConfig, provider: Any, texts: Sequence[str]) -> dict[int, str]:
    """Row -> explanation, of the rows that have one. Raises ProviderError when too many have none."""
    journal = Path(config.out) / _JOURNAL
    explained = _read_journal(journal, len(texts))
    requests = [ExplainRequest(row, text) for row, text in enumerate(texts) if row not in explained]
    failures: list[str] = []
    bar = progress(
        "explain", active=True, total=len(texts), initial=len(explained), bar=config.logger.progress, unit="row"
    )
    with bar, journal.open("a") as lines:
        for answer in provider.explain(requests):
            text = None if answer.text is None else bare_explanation(answer.text)
            if text is None or not text.strip():
                unusable = "an empty explanation" if text is not None else "explanation tags inside the explanation"
                failures.append(unusable if answer.text is not None else answer.error or "no reason given")
            else:
                explained[answer.row] = text
                lines.write(json.dumps({"row": answer.row, "text": text}) + "\n")
                lines.flush()  # line by line, so that a killed process loses no finished row
            bar.advance()
    if len(failures) > config.max_failures * len(texts):
        raise ProviderError(
            f"{len(failures)} of {len(texts)} rows without an explanation, the first because: {failures[0]}",
            f"at most a share of max_failures={config.max_failures:g}",
            "repeat the command: finished rows are kept and only the others asked again",
        )  # fmt: skip
    return explained


def _read_journal(path: Path, n_rows: int) -> dict[int, str]:
    """Finished rows; a line torn by a kill is dropped, and asked again.

    Raises:
        RunDirectoryError: a whole line that is none of ours, or of a row that the table does not have.
    """
    done: dict[int, str] = {}
    heal(path)
    for number, line in enumerate(read_rows(path, ("row", "text")), 1):
        row, text = line["row"], line["text"]
        if type(row) is not int or not 0 <= row < n_rows or not isinstance(text, str):
            raise RunDirectoryError(
                f"line {number} of {path} is {shown(line)}", f"a row from 0 to {n_rows - 1} and its text",
                "remove this line, and its row is asked again",
            )  # fmt: skip
        done[row] = text
    return done


def _batches(base: Table, kept: list[int], explained: dict[int, str]) -> Iterator[dict[str, Any]]:
    names = (columns.N_RAW_TOKENS, columns.TEXT, columns.LAYER, columns.DOC_ID)
    values = {name: base.column(name) for name in names}
    for start in range(0, len(kept), _ROWS_PER_BATCH):
        rows = kept[start : start + _ROWS_PER_BATCH]
        yield {
            **{name: [values[name][row] for row in rows] for name in names},
            columns.EXPLANATION: [explained[row] for row in rows],
            columns.VECTOR: base.vectors(rows),
            columns.PRECEDING: base.preceding(rows),
        }
