from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nla_megatron.contract import columns
from nla_megatron.contract.tables import Table, vector_array, write_table
from nla_megatron.errors import ColumnError, MissingFile

D = 4
SCHEMA = columns.schema("base", D)


def batch(v_ND: np.ndarray, first: int = 0) -> dict[str, object]:
    rows = range(first, first + len(v_ND))
    return {
        "doc_id": [f"c:train:{i // 10}" for i in rows],
        "activation_vector": v_ND,
        "activation_layer": [3] * len(v_ND),
        "n_raw_tokens": list(rows),
        "detokenized_text_truncated": ["text"] * len(v_ND),
    }


def random_vectors(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, D)).astype(np.float32)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """5000 rows: several row groups, and several chunks in the Arrow copy."""
    path = tmp_path_factory.mktemp("tables") / "base.parquet"
    v_ND = random_vectors(5000)
    assert write_table(path, (batch(v_ND[i : i + 7], i) for i in range(0, 5000, 7)), SCHEMA) == 5000
    return path, v_ND


def test_rows_come_back_whatever_way_they_are_asked_for(large: tuple[Path, np.ndarray]) -> None:
    path, v_ND = large
    table = Table.open(path, "base")
    assert (table.n_rows, table.d_model, table.path) == (5000, D, path)
    assert table.column("n_raw_tokens") == list(range(5000))
    assert table.column("doc_id")[4999] == "c:train:499"
    for rows in ([], [4999, 0, 4999, 2047, 2048], range(5000), np.arange(4999, -1, -7)):
        found = table.vectors(rows)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, v_ND[np.asarray(rows, dtype=int)])


@given(st.lists(st.integers(0, 4999), max_size=40))
def test_any_selection_matches_numpy(large: tuple[Path, np.ndarray], rows: list[int]) -> None:
    path, v_ND = large
    np.testing.assert_array_equal(Table.open(path, "base").vectors(rows), v_ND[np.array(rows, dtype=int)])


def test_the_result_is_the_callers_own(large: tuple[Path, np.ndarray]) -> None:
    table = Table.open(large[0], "base")
    table.vectors([0])[:] = 0
    np.testing.assert_array_equal(table.vectors([0]), large[1][:1])


def test_vectors_are_mapped_not_loaded(large: tuple[Path, np.ndarray]) -> None:
    before = pa.total_allocated_bytes()
    table = Table.open(large[0], "base")
    table.vectors(range(5000))
    assert pa.total_allocated_bytes() - before < 5000 * D * 4 / 2
    assert table.n_rows == 5000  # keeps the table alive until the count is taken


def test_small_batches_do_not_become_small_row_groups(large: tuple[Path, np.ndarray]) -> None:
    assert pq.ParquetFile(large[0]).num_row_groups <= 5


def test_the_written_file_has_the_contracts_schema(large: tuple[Path, np.ndarray]) -> None:
    assert pq.read_schema(large[0]).equals(SCHEMA)


@pytest.mark.parametrize("rows", [[-1], [5000], [[0]], [0.0], [True], ["0"]])
def test_bad_rows_are_refused(large: tuple[Path, np.ndarray], rows: list[object]) -> None:
    with pytest.raises(ValueError, match="row"):
        Table.open(large[0], "base").vectors(rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_vector_that_is_not_finite_is_named_before_a_run_draws_its_row(tmp_path: Path, value: float) -> None:
    v_ND = random_vectors(3000)
    v_ND[2613, 2] = value
    write_table(tmp_path / "t.parquet", [batch(v_ND)], SCHEMA)
    with pytest.raises(ColumnError, match=r"t\.parquet' is not finite in row 2613"):
        Table.open(tmp_path / "t.parquet", "base")
    assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"]


@pytest.mark.parametrize("at", [5, 300])
def test_bytes_that_are_damaged_behind_a_whole_footer_are_named(tmp_path: Path, at: int) -> None:
    write_table(tmp_path / "t.parquet", [batch(random_vectors(200))], SCHEMA)
    data = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "t.parquet").write_bytes(data[:at] + b"\xef\xbb\xbf" * 9 + data[at:])
    with pytest.raises(ColumnError, match=r"t\.parquet is not readable"):
        Table.open(tmp_path / "t.parquet", "base")


def test_null_vectors_are_refused_when_opened(tmp_path: Path) -> None:
    whole = pa.table({**batch(random_vectors(2)), "activation_vector": vector_array(random_vectors(2))})
    kind = pa.list_(pa.float32(), D)
    for vectors in ([[0.0] * D, None], [[0.0] * D, [0.0, None, 0.0, 0.0]]):
        column = pa.array(vectors, type=kind)
        index = whole.schema.get_field_index("activation_vector")
        pq.write_table(whole.set_column(index, "activation_vector", column), tmp_path / "t.parquet")
        with pytest.raises(ColumnError, match="nulls"):
            Table.open(tmp_path / "t.parquet", "base")


def test_vectors_never_become_python_objects(large: tuple[Path, np.ndarray]) -> None:
    with pytest.raises(ValueError, match="vectors"):
        Table.open(large[0], "base").column("activation_vector")


def test_missing_files_columns_and_broken_files_are_named(tmp_path: Path, large: tuple[Path, np.ndarray]) -> None:
    with pytest.raises(MissingFile, match="none"):
        Table.open(tmp_path / "none.parquet", "base")
    with pytest.raises(ColumnError, match="'prompt'"):
        Table.open(large[0], "rl")
    with pytest.raises(ColumnError, match="'note'"):
        Table.open(large[0], "base").column("note")
    (tmp_path / "cut.parquet").write_bytes(large[0].read_bytes()[:-100])
    with pytest.raises(ColumnError, match="not readable"):
        Table.open(tmp_path / "cut.parquet", "base")


def test_a_rewritten_table_never_meets_its_old_copy(tmp_path: Path) -> None:
    path = tmp_path / "t[1].parquet"
    for seed in range(3):
        v_ND = random_vectors(5, seed)
        write_table(path, [batch(v_ND)], SCHEMA)
        os.utime(path, ns=(seed, seed))  # clocks of some file systems are coarse
        np.testing.assert_array_equal(Table.open(path, "base").vectors(range(5)), v_ND)
    assert len(list(tmp_path.iterdir())) == 2  # stale copies are gone


def test_the_copy_is_made_once(large: tuple[Path, np.ndarray]) -> None:
    Table.open(large[0], "base")
    (copy,) = large[0].parent.glob(".*.arrow")
    inode = copy.stat().st_ino
    Table.open(large[0], "base")
    assert copy.stat().st_ino == inode
    stat = large[0].stat()
    assert copy.name == f".base.parquet.{stat.st_size}-{stat.st_mtime_ns}.arrow"


def _open_at_once(path: Path, gate: object, results: object) -> None:
    gate.wait()  # type: ignore[attr-defined]
    results.put(float(Table.open(path, "base").vectors(range(4000)).sum()))  # type: ignore[attr-defined]


def test_ranks_that_open_at_once_all_read_the_whole_table(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    v_ND = random_vectors(4000)
    write_table(path, [batch(v_ND)], SCHEMA)
    context = multiprocessing.get_context("spawn")
    gate, results = context.Barrier(3), context.Queue()
    ranks = [context.Process(target=_open_at_once, args=(path, gate, results)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    sums = [results.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join(timeout=60)
    assert sums == [float(v_ND.sum())] * 3
    assert len(list(tmp_path.iterdir())) == 2


@pytest.fixture
def read_only_directory() -> Iterator[Path]:
    """A directory this process cannot write to, also when the tests run as root."""
    directory = Path(tempfile.mkdtemp())
    user = os.geteuid()
    write_table(directory / "t.parquet", [batch(random_vectors(5))], SCHEMA)
    directory.chmod(0o555)
    if user == 0:
        os.seteuid(65534)
    yield directory
    os.seteuid(user)
    directory.chmod(0o755)
    shutil.rmtree(directory)


def test_a_read_only_directory_is_read_from_memory(read_only_directory: Path) -> None:
    table = Table.open(read_only_directory / "t.parquet", "base")
    np.testing.assert_array_equal(table.vectors(range(5)), random_vectors(5))
    assert [path.name for path in read_only_directory.iterdir()] == ["t.parquet"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    write_table(path, [batch(random_vectors(3))], SCHEMA)
    before = path.read_bytes()

    def interrupted() -> Iterator[dict[str, object]]:
        yield batch(random_vectors(4000))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_table(path, interrupted(), SCHEMA)
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["t.parquet"]


def test_batches_of_every_kind_are_written_alike(tmp_path: Path) -> None:
    v_ND = random_vectors(6)
    table = pa.table({**batch(v_ND), "activation_vector": vector_array(v_ND)}, schema=SCHEMA)
    sliced = [table.slice(0, 2), table.slice(2, 3).to_batches()[0], batch(v_ND[5:], 5)]
    assert write_table(tmp_path / "t.parquet", sliced, SCHEMA) == 6
    assert pq.read_table(tmp_path / "t.parquet").equals(table)


def test_an_empty_table_is_a_table(tmp_path: Path) -> None:
    assert write_table(tmp_path / "t.parquet", [], SCHEMA) == 0
    table = Table.open(tmp_path / "t.parquet", "base")
    assert (table.n_rows, table.d_model, table.vectors([]).shape) == (0, D, (0, D))


def test_a_batch_that_does_not_fit_the_schema_is_named(tmp_path: Path) -> None:
    lacking = batch(random_vectors(2))
    del lacking["doc_id"]
    with pytest.raises(ColumnError, match="no column 'doc_id'"):
        write_table(tmp_path / "t.parquet", [lacking], SCHEMA)
    with pytest.raises(ColumnError, match="'n_raw_tokens'"):
        write_table(tmp_path / "t.parquet", [{**batch(random_vectors(2)), "n_raw_tokens": ["a", "b"]}], SCHEMA)
    with pytest.raises(ColumnError, match="'activation_vector'"):
        write_table(
            tmp_path / "t.parquet", [{**batch(random_vectors(2)), "activation_vector": np.ones((2, 5))}], SCHEMA
        )
    assert list(tmp_path.iterdir()) == []


def test_an_array_that_is_not_rows_of_vectors_is_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        vector_array(np.ones(4))


def stacked(path: Path, v_NKD: np.ndarray) -> Table:
    preceding = {"preceding_vectors": v_NKD[:, :-1].reshape(len(v_NKD), -1)}
    write_table(path, [{**batch(v_NKD[:, -1]), **preceding}], columns.schema("base", D, v_NKD.shape[1]))
    return Table.open(path, "base")


def test_vectors_before_a_row_s_own_come_back_oldest_first(tmp_path: Path) -> None:
    v_NKD = np.random.default_rng(1).standard_normal((3000, 3, D)).astype(np.float32)
    table, rows = stacked(tmp_path / "base.parquet", v_NKD), [2999, 0, 2047, 2048, 0]
    assert (table.d_model, table.positions) == (D, 3)
    np.testing.assert_array_equal(table.inputs(rows), v_NKD[rows])
    np.testing.assert_array_equal(table.vectors(rows), v_NKD[rows, 2])
    np.testing.assert_array_equal(table.preceding(rows), v_NKD[rows, :2].reshape(5, 2 * D))
    assert table.inputs([]).shape == (0, 3, D)
    with pytest.raises(ValueError, match="use vectors"):
        table.column("preceding_vectors")


def test_a_table_of_single_vectors_has_none_before_them(large: tuple[Path, np.ndarray]) -> None:
    table = Table.open(large[0], "base")
    assert table.positions == 1 and table.preceding([3, 4]).shape == (2, 0)
    np.testing.assert_array_equal(table.inputs([3, 4]), large[1][[3, 4]])


def test_a_number_that_is_none_before_a_row_s_own_vector_is_named(tmp_path: Path) -> None:
    v_NKD = np.ones((4, 3, D), dtype=np.float32)
    v_NKD[2, 0, 1] = np.nan
    with pytest.raises(ColumnError, match=r"'preceding_vectors' in .* is not finite in row 2"):
        stacked(tmp_path / "base.parquet", v_NKD)


def test_nulls_before_a_row_s_own_vector_are_named(tmp_path: Path) -> None:
    schema = columns.schema("base", D, 2)
    write_table(
        tmp_path / "base.parquet", [{**batch(random_vectors(2)), "preceding_vectors": [[1.0] * D, None]}], schema
    )
    with pytest.raises(ColumnError, match="'preceding_vectors' in .* has nulls"):
        Table.open(tmp_path / "base.parquet", "base")
