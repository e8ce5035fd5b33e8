"""Finished explanations are kept whatever happens: a torn line, a failing provider, a kill."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nla_megatron.config.compose import compose
from nla_megatron.config.schema import ExplainConfig, ProviderConfig
from nla_megatron.contract import columns
from nla_megatron.contract.sidecar import PoolSpec, read_dataset_sidecar, write_dataset_sidecar
from nla_megatron.contract.tables import Table
from nla_megatron.datagen import explain
from nla_megatron.errors import ColumnError, ConfigError, MissingFile, ProviderError, SidecarError
from tests.support.messages_server import MessagesServer, Received, Reply
from tests.support.ranks import ROOT
from tests.support.tiny import tiny_rows, tiny_table

GOOD = "<explanation>\nA recipe is under way.\nThe final token is a comma.\n</explanation>"
GOOD_BODY = "A recipe is under way.\nThe final token is a comma."


def base_table(directory: Path, model: Path, texts: list[str]) -> Path:
    """A base table with these texts, one document each."""
    rows = tiny_rows(64, documents=len(texts), rows_per_document=1)
    return tiny_table(directory / "base.parquet", model, "base", {**rows, columns.TEXT: texts})


def journal(config: ExplainConfig) -> Path:
    return Path(config.out) / "explanations.jsonl"


def lines(config: ExplainConfig) -> dict[int, str]:
    return {row["row"]: row["text"] for row in map(json.loads, journal(config).read_text().splitlines())}


def explained(config: ExplainConfig) -> Table:
    return Table.open(Path(config.out) / explain.TABLE, "explained")


def run(config: ExplainConfig) -> None:
    """As the command does it: everything is checked first."""
    explain.check(config, 1)
    explain.run(config)


@pytest.fixture
def keywords(tmp_path: Path, model_dir: Path) -> Callable[..., ExplainConfig]:
    """A configuration over texts; the provider `keywords` fails on those without two features."""

    def make(texts: list[str], **changes: Any) -> ExplainConfig:
        source = base_table(tmp_path, model_dir, texts)
        return ExplainConfig(out=str(tmp_path / "out"), input=str(source), **changes)

    return make


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_vectors_that_are_not_finite_are_named_before_anything_is_paid_for(
    value: float, tmp_path: Path, model_dir: Path
) -> None:
    rows = tiny_rows(64, documents=4, rows_per_document=2)
    rows[columns.VECTOR][5, 7] = value
    source = tiny_table(tmp_path / "base.parquet", model_dir, "base", rows)
    with pytest.raises(ColumnError, match="not finite in row 5"):
        explain.check(ExplainConfig(out=str(tmp_path / "out"), input=str(source)), 1)


def test_each_row_gets_the_explanation_of_its_text(keywords: Callable[..., ExplainConfig]) -> None:
    config = keywords(["whales sing; whales dive", "bread rises slowly", "rivers carry stones"])
    run(config)
    table, source = explained(config), Table.open(config.input, "base")
    assert [text.splitlines()[0] for text in table.column(columns.EXPLANATION)] == [
        "last: dive", "last: slowly", "last: stones",
    ]  # fmt: skip
    assert table.column(columns.TEXT) == source.column(columns.TEXT)
    sidecar, parent = read_dataset_sidecar(table.path), read_dataset_sidecar(config.input)
    assert sidecar.api_summaries is not None and sidecar.api_summaries.model == "keywords"
    assert sidecar.parent_datasets == (parent.dataset_id,) and sidecar.dataset_id != parent.dataset_id
    assert (sidecar.row_count, sidecar.extraction) == (3, parent.extraction)


def test_failed_rows_are_dropped_and_the_others_keep_their_vectors(keywords: Callable[..., ExplainConfig]) -> None:
    config = keywords(["whales sing", "!", "bread rises", "", "rivers carry"], max_failures=0.4)
    run(config)
    table, source = explained(config), Table.open(config.input, "base")
    assert table.column(columns.TEXT) == ["whales sing", "bread rises", "rivers carry"]
    assert table.column(columns.DOC_ID) == [f"tiny:train:{row}" for row in (0, 2, 4)]
    np.testing.assert_array_equal(table.vectors([0, 1, 2]), source.vectors([0, 2, 4]))
    assert read_dataset_sidecar(table.path).row_count == 3


def test_rows_with_any_number_of_activations_keep_all_of_them(tmp_path: Path, model_dir: Path) -> None:
    rows = tiny_rows(64, documents=1, rows_per_document=4, positions=3, fewest=1)
    texts = ["whales sing", "bread rises", "!", "rivers carry"]
    source = tiny_table(tmp_path / "base.parquet", model_dir, "base", {**rows, columns.TEXT: texts})
    config = ExplainConfig(out=str(tmp_path / "out"), input=str(source), max_failures=0.3)
    run(config)
    table, base = explained(config), Table.open(source, "base")
    assert table.activations.tolist() == [1, 2, 1]
    np.testing.assert_array_equal(table.inputs([0, 1, 2], 3), base.inputs([0, 1, 3]))
    assert read_dataset_sidecar(table.path).pool == PoolSpec("stack", 3, 1)


def test_too_many_failures_stop_the_stage_and_keep_what_was_finished(keywords: Callable[..., ExplainConfig]) -> None:
    config = keywords(["whales sing", "!", "bread rises", "", "rivers carry"], max_failures=0.3)
    with pytest.raises(ProviderError, match="2 of 5 rows without an explanation, the first because: features"):
        run(config)
    assert sorted(lines(config)) == [0, 2, 4]
    assert not (Path(config.out) / explain.TABLE).exists() and not (Path(config.out) / "done").exists()


def test_a_torn_last_line_is_asked_again_and_whole_lines_are_not(keywords: Callable[..., ExplainConfig]) -> None:
    config = keywords(["whales sing", "bread rises", "rivers carry"])
    run(config)
    whole = journal(config).read_bytes()
    marked = json.dumps({"row": 0, "text": "kept from before\nthe kill, naïve"}) + "\n"
    torn = json.dumps({"row": 2, "text": "half a li"})[:-7]
    journal(config).write_text(marked + torn)
    run(config)
    assert explained(config).column(columns.EXPLANATION)[0] == "kept from before\nthe kill, naïve"
    found = journal(config).read_bytes()
    assert found.startswith(marked.encode()) and sorted(lines(config)) == [0, 1, 2]
    assert found[len(marked) :].splitlines() == whole.splitlines()[1:]


def test_a_finished_stage_is_repeated_without_asking_anybody(keywords: Callable[..., ExplainConfig]) -> None:
    config = keywords(["whales sing", "bread rises"])
    run(config)
    before = journal(config).read_bytes()
    run(config)
    assert journal(config).read_bytes() == before


def test_documents_are_rebuilt_from_the_longest_prefix_of_each_window() -> None:
    texts = ["One", "One two", "Then", "Then more", "Other", "One"]
    doc_ids = ["a", "a", "a", "a", "b", "c"]
    assert explain.documents(texts, doc_ids) == ["One two\nThen more", "Other", "One"]


def test_mistakes_are_named_before_anything_is_written(keywords: Callable[..., ExplainConfig]) -> None:
    config = keywords(["whales sing"])
    with pytest.raises(MissingFile, match="nowhere.parquet"):
        explain.check(replace(config, input="nowhere.parquet"), 1)
    with pytest.raises(ConfigError, match="'oracle'"):
        explain.check(replace(config, provider=ProviderConfig("oracle")), 1)
    with pytest.raises(ConfigError, match="n_words"):
        explain.check(replace(config, provider=ProviderConfig("keywords", {"n_words": 3})), 1)
    assert not Path(config.out).exists()


@pytest.fixture
def api_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("ANTHROPIC_BASE_URL", "ANTHROPIC_CUSTOM_HEADERS"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in (("NO_PROXY", "127.0.0.1"), ("no_proxy", "127.0.0.1"), ("ANTHROPIC_API_KEY", "test-key")):
        monkeypatch.setenv(variable, value)


def asking(server: MessagesServer, directory: Path, source: Path) -> list[str]:
    """The overrides of `explain` with the provider `anthropic` at `server`, one request at a time."""
    options = f"{{base_url:'{server.base_url}',concurrency:1,max_retries:0,backoff:0.01}}"
    return [f"out={directory / 'out'}", f"input={source}", "provider=anthropic", f"provider.options={options}"]


@pytest.mark.usefixtures("api_key")
@pytest.mark.parametrize("status", [500, 401])
def test_a_provider_that_fails_half_way_is_resumed_where_it_stopped(
    status: int, tmp_path: Path, model_dir: Path
) -> None:
    """500 fails row by row until the share is too large; 401 holds for all rows and stops at once."""
    source, healed = base_table(tmp_path, model_dir, [f"row {row}" for row in range(6)]), threading.Event()

    def behaviour(request: Received) -> Reply:
        broken = request.user >= "<text>row 3" and not healed.is_set()
        return Reply("no", status=status) if broken else Reply(GOOD)

    with MessagesServer(behaviour) as server:
        config = compose("explain", asking(server, tmp_path, source))
        with pytest.raises(ProviderError, match="no"):
            run(config)
        assert sorted(lines(config)) == [0, 1, 2]
        asked = len(server.received)
        healed.set()
        run(config)
        again = [request.user for request in server.received[asked:]]
    assert again == [f"<text>row {row}</text>" for row in (3, 4, 5)]
    assert explained(config).column(columns.EXPLANATION) == [GOOD_BODY] * 6


@pytest.mark.usefixtures("api_key")
def test_a_killed_process_loses_no_finished_row(tmp_path: Path, model_dir: Path) -> None:
    """The fourth answer never comes; the process is killed while it waits, with three rows behind it."""
    source = base_table(tmp_path, model_dir, [f"row {row}" for row in range(5)])

    def behaviour(request: Received) -> Reply:
        return Reply(GOOD, delay=60.0 if "row 3<" in request.user and request.attempt == 1 else 0.0)

    with MessagesServer(behaviour) as server:
        overrides = asking(server, tmp_path, source)
        config = compose("explain", overrides)
        process = subprocess.Popen([sys.executable, "-m", "nla_megatron", "explain", *overrides], cwd=ROOT)
        try:
            deadline = time.monotonic() + 120
            while not (journal(config).is_file() and journal(config).read_bytes().count(b"\n") == 3):
                assert process.poll() is None, "the stage ended by itself"
                assert time.monotonic() < deadline, "finished rows are not on disk while the stage waits for others"
                time.sleep(0.02)
        finally:
            process.kill()
            process.wait(timeout=30)
        asked = len(server.received)
        run(config)
        again = {request.user for request in server.received[asked:]}
    assert again == {"<text>row 3</text>", "<text>row 4</text>"}
    assert explained(config).column(columns.EXPLANATION) == [GOOD_BODY] * 5


def test_activations_of_several_positions_are_carried_through(tmp_path: Path, model_dir: Path) -> None:
    rows = {**tiny_rows(64, 3, 1, positions=3), columns.TEXT: ["whales sing; whales dive", "x", "rivers carry stones"]}
    source = tiny_table(tmp_path / "base.parquet", model_dir, "base", rows)
    config = ExplainConfig(out=str(tmp_path / "out"), input=str(source), max_failures=0.5)
    run(config)
    table = explained(config)
    assert (table.n_rows, table.positions) == (2, 3)
    np.testing.assert_array_equal(table.inputs([0, 1]), Table.open(source, "base").inputs([0, 2]))
    assert read_dataset_sidecar(table.path).pool == read_dataset_sidecar(source).pool is not None


def test_a_table_with_other_activations_than_its_sidecar_says_is_refused(tmp_path: Path, model_dir: Path) -> None:
    source = tiny_table(tmp_path / "base.parquet", model_dir, "base", tiny_rows(64, 3, 1, positions=3))
    write_dataset_sidecar(source, replace(read_dataset_sidecar(source), pool=None))
    with pytest.raises(SidecarError, match="3 activations in each row"):
        explain.check(ExplainConfig(out=str(tmp_path / "out"), input=str(source)), 1)
