"""Tables: written in a stream, read through a memory map, vectors never as Python objects.

Parquet is the exchange format. For random access the first reader puts an uncompressed Arrow copy beside it, and every
rank maps that one file, so that the page cache holds the vectors once per machine however many ranks read them.
Shapes: N rows asked for, D width, K activations of a row.
"""

from __future__ import annotations

import errno
import glob
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nla_megatron.contract.columns import EXPLANATION, PRECEDING, PROMPT, VECTOR, check_columns, positions_of, required
from nla_megatron.contract.files import atomic_path
from nla_megatron.contract.lists import Lists, check_finite, check_finite_rows
from nla_megatron.contract.markers import INJECT
from nla_megatron.errors import ColumnError, MissingFile
from nla_megatron.reading import parquet_errors, parquet_schema, python_values

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_ROWS_PER_GROUP = 2048  # 64 MiB of vectors at width 8192: large enough to scan fast, small enough to hold
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


def vector_array(v_ND: np.ndarray) -> pa.FixedSizeListArray:
    """Vectors (N, D) as an Arrow column of float32 lists, without a Python object per number."""
    import pyarrow as pa

    if v_ND.ndim != 2:
        raise ValueError(f"vectors must have the shape (N, D), got {v_ND.shape}")
    flat = np.ascontiguousarray(v_ND, dtype=np.float32).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), v_ND.shape[1])


def write_table(
    path: Path | str,
    batches: Iterable[pa.RecordBatch | pa.Table | Mapping[str, Any]],
    schema: pa.Schema,
) -> int:
    """Write batches as they come; the file appears when all are written, or not at all.

    Args:
        path: the parquet file.
        batches: record batches, tables, or mappings from column name to values (a NumPy array (N, D) for vectors).
        schema: from `columns.schema`; columns are put in its order, others are left out.

    Returns:
        The number of rows written.

    Raises:
        ColumnError: a batch lacks a column, or has one of another type.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, held = 0, []
    # A dictionary of floats only costs time; strings such as `doc_id` shrink a lot.
    texts = [name for name in schema.names if name not in (VECTOR, PRECEDING)]
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema, use_dictionary=texts) as writer:
        for batch in batches:
            held.append(_as_table(batch, schema, path))
            rows += held[-1].num_rows
            if sum(table.num_rows for table in held) >= _ROWS_PER_GROUP:
                writer.write_table(pa.concat_tables(held), row_group_size=_ROWS_PER_GROUP)
                held = []
        if held:
            writer.write_table(pa.concat_tables(held), row_group_size=_ROWS_PER_GROUP)
    return rows


@dataclass(frozen=True, eq=False)
class Table:
    """A table of one stage, opened for random access.

    Attributes:
        path: the parquet file.
        n_rows: its rows.
        d_model: D, the width of its vectors.
        positions: K, the activations that a row keeps of consecutive positions, its own the last; mostly 1. Where each
            row keeps a number of its own, the largest.

    Example:
        >>> table = Table.open("data/rl.parquet", "rl")
        >>> table.vectors([0, 7]).shape == (2, table.d_model)
        True
    """

    path: Path
    n_rows: int
    d_model: int
    positions: int
    _data: pa.Table = field(repr=False)
    # By column, zero-copy views (rows of the chunk, its width).
    _chunks: Mapping[str, tuple[np.ndarray, ...]] = field(repr=False)
    _starts: np.ndarray = field(repr=False)  # first row of each chunk
    _lists: Lists | None = field(default=None, repr=False)  # preceding vectors, where each row has its own number

    @classmethod
    def open(cls, path: Path | str, stage: str) -> Table:
        """Check the columns and map the table; values are read when asked for.

        Raises:
            MissingFile: no such file.
            ColumnError: not a parquet file, a column that is missing or of another type, or null vectors.
        """
        path = Path(path)
        if not path.is_file():
            raise MissingFile(f"no file at {str(path)!r}", f"a {stage!r} table", f"run the stage that writes {stage!r}")
        found = parquet_schema(path)
        d_model = check_columns(found, stage, path)
        positions = positions_of(found, d_model, path)
        data = _mapped(path)
        for name in set(required(stage)) - {VECTOR, EXPLANATION}:  # what `explain` leaves out is for `build` to judge
            _check_nulls(data.column(name), name, path)
        lists = None if positions is not None else Lists.of(data.column(PRECEDING), PRECEDING, d_model, path)
        names = (VECTOR,) if lists is not None or positions == 1 else (VECTOR, PRECEDING)
        chunks = {name: _views(data, name, path) for name in names}
        starts = np.cumsum([0, *(len(chunk) for chunk in chunks[VECTOR])])[:-1]
        if lists is not None:
            positions = 1 + int(lists.vectors.max(initial=0))
        assert positions is not None
        return cls(path, data.num_rows, d_model, positions, data, chunks, starts, lists)

    def column(self, name: str, nulls: bool = False) -> list[Any]:
        """All values of a column other than the vectors, as Python objects.

        Args:
            nulls: whether values may be missing.

        Raises:
            ColumnError: no such column, or a value that is missing or no valid text, with its row.
            ValueError: a column of vectors, which `vectors` and `preceding` read.
        """
        if name in (VECTOR, PRECEDING):
            raise ValueError(f"{name!r} as Python objects would stall the garbage collector; use vectors()")
        if name not in self._data.column_names:
            raise ColumnError(
                f"no column {name!r} in {str(self.path)!r}; it has {', '.join(self._data.column_names)}",
                f"a column {name!r}",
                "write the table again with this column",
            )
        values = python_values(self._data.column(name), name, self.path)
        if not nulls:
            _check_nulls(self._data.column(name), name, self.path)
        return values

    def value(self, name: str, row: int) -> Any:
        """One value of a column other than the vectors; None where the table has no such column."""
        return self._data.column(name)[row].as_py() if name in self._data.column_names else None

    def vectors(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Vectors of the given rows, in that order, repeats allowed: a fresh float32 array (N, D).

        Rows are copied one chunk at a time from the map: Arrow's `take` corrupts fixed-size lists above 4 GiB.

        Raises:
            ValueError: rows that are not whole numbers from 0 to below `n_rows`.
            ColumnError: a vector holds NaN or infinity, with its row.
        """
        return self._floats(VECTOR, rows)

    @property
    def varies(self) -> bool:
        """Each row keeps a number of activations of its own."""
        return self._lists is not None

    @cached_property
    def activations(self) -> np.ndarray:
        """How many each row keeps, (rows,) int64."""
        return np.full(self.n_rows, self.positions) if self._lists is None else 1 + self._lists.vectors

    def preceding(self, rows: Sequence[int] | np.ndarray) -> np.ndarray | list[np.ndarray]:
        """The vectors before each row's own, oldest first and side by side; raises as `vectors`.

        Returns:
            (N, (K - 1) D), or where each row keeps a number of its own, N arrays of ((its number - 1) D,).
        """
        if self._lists is not None:
            return [self._lists.of_row(int(row)) for row in rows]
        if self.positions == 1:
            return np.empty((len(rows), 0), dtype=np.float32)
        return self._floats(PRECEDING, rows)

    def inputs(self, rows: Sequence[int] | np.ndarray, positions: int | None = None) -> np.ndarray:
        """What the AV reads: `vectors` (N, D), or where rows keep several, all of them, the own last: (N, K, D).

        A row that keeps fewer has NaN in front, in the place of those that it lacks.

        Args:
            positions: K, where each row keeps a number of its own; None is this table's largest.
        """
        own_ND = self.vectors(rows)
        if self._lists is not None:
            return self._lists.before(own_ND, rows, self.positions if positions is None else positions)
        if self.positions == 1:
            return own_ND
        preceding = self._floats(PRECEDING, rows)
        return np.concatenate([preceding, own_ND], axis=1).reshape(-1, self.positions, self.d_model)

    def markers(self) -> np.ndarray:
        """How often the `prompt` of each row of an av_sft or rl table holds `<INJECT>`, (rows,) int64."""
        import pyarrow.compute as pc

        counts = []
        for chunk in self._data.column(PROMPT).chunks:
            found = pc.count_substring(chunk.flatten().field("content"), INJECT).fill_null(0).to_numpy()
            counts.append(np.bincount(pc.list_parent_indices(chunk).to_numpy(), found, minlength=len(chunk)))
        return np.concatenate([np.empty(0), *counts]).astype(np.int64)

    def _floats(self, name: str, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        chunks = self._chunks[name]
        rows_N = np.asarray(rows)
        if rows_N.ndim != 1 or (rows_N.size and rows_N.dtype.kind not in "iu"):
            raise ValueError(f"rows must be a flat sequence of integers, got {rows_N.dtype} of shape {rows_N.shape}")
        rows_N = rows_N.astype(np.int64)
        outside = rows_N[(rows_N < 0) | (rows_N >= self.n_rows)]
        if outside.size:
            raise ValueError(
                f"row {outside[0]} is outside of {str(self.path)!r}, which has rows 0 to {self.n_rows - 1}"
            )
        width = self.d_model if name == VECTOR else (self.positions - 1) * self.d_model
        out_ND = np.empty((rows_N.size, width), dtype=np.float32)
        chunk_N = np.searchsorted(self._starts, rows_N, side="right") - 1
        for index in np.unique(chunk_N):
            here = chunk_N == index
            out_ND[here] = chunks[index][rows_N[here] - self._starts[index]]
        check_finite(name, self.path, out_ND, rows_N)
        return out_ND


def _check_nulls(column: pa.ChunkedArray, name: str, path: Path) -> None:
    """Raises ColumnError with the first row of a column that has no value."""
    if column.null_count:
        import pyarrow.compute as pc

        row = pc.index(pc.is_null(column), True).as_py()
        raise ColumnError(
            f"{name!r} in row {row} of {str(path)!r} is null, as in {column.null_count} of {len(column)} rows",
            "a value in every row", "write the table again without these rows, or with their values",
        )  # fmt: skip


def _views(data: pa.Table, name: str, path: Path) -> tuple[np.ndarray, ...]:
    """The chunks of a column of vectors. Raises ColumnError where it has nulls."""
    column = data.column(name)
    if column.null_count or any(chunk.flatten().null_count for chunk in column.chunks):
        raise ColumnError(
            f"column {name!r} in {str(path)!r} has nulls", "a number everywhere", "extract the activations again"
        )
    width = column.type.list_size
    return tuple(chunk.flatten().to_numpy().reshape(-1, width) for chunk in column.chunks if len(chunk))


def _as_table(batch: Any, schema: pa.Schema, path: Path | str) -> pa.Table:
    import pyarrow as pa

    columns = batch if isinstance(batch, Mapping) else {name: batch.column(name) for name in batch.schema.names}
    missing = [name for name in schema.names if name not in columns]
    remedy = "this is what the stage before should have written; run it again"
    if missing:
        raise ColumnError(f"no column {missing[0]!r} in a batch for {str(path)!r}", ", ".join(schema.names), remedy)
    arrays = {}
    for expected in schema:
        values = columns[expected.name]
        values = vector_array(values) if isinstance(values, np.ndarray) and values.ndim == 2 else values
        try:
            if isinstance(values, pa.Array | pa.ChunkedArray):
                arrays[expected.name] = values.cast(expected.type)
            else:
                arrays[expected.name] = pa.array(values, type=expected.type)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            found = f"column {expected.name!r} of a batch for {str(path)!r}: {error}"
            raise ColumnError(found, f"values of type {expected.type}", remedy) from error
    return pa.table(arrays, schema=schema)


def _mapped(path: Path) -> pa.Table:
    """The whole table from a memory map, or from memory where no copy can be written beside it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    stat = path.stat()
    # Size and time are in the name, so a rewritten table never meets an old copy.
    copy = path.with_name(f".{path.name}.{stat.st_size}-{stat.st_mtime_ns}.arrow")
    if not copy.is_file():
        try:
            _write_copy(path, copy)
        except OSError as error:
            if error.errno not in _READ_ONLY:
                raise
            with pq.ParquetFile(path) as source:
                return pa.Table.from_batches(_batches(source, path), source.schema_arrow)
    return pa.ipc.open_file(pa.memory_map(str(copy))).read_all()


def _batches(source: pq.ParquetFile, path: Path) -> Iterator[pa.RecordBatch]:
    """All rows, vectors known to be finite: a run would meet one that is not when its row is drawn, hours later.

    Raises:
        ColumnError: one is not, or bytes of the file are damaged.
    """
    start = 0
    with parquet_errors(path):
        for batch in source.iter_batches(batch_size=_ROWS_PER_GROUP):
            for name in (VECTOR, PRECEDING):
                if name in batch.schema.names:
                    check_finite_rows(name, path, batch.column(name), start)
            start += len(batch)
            yield batch


def _write_copy(path: Path, copy: Path) -> None:
    """Convert in a stream. Ranks that come here together write the same bytes, and the last rename wins."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with (
        pq.ParquetFile(path) as source,
        atomic_path(copy) as temporary,
        pa.ipc.new_file(str(temporary), source.schema_arrow) as sink,
    ):
        for batch in _batches(source, path):
            sink.write_batch(batch)
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.arrow"):
        if stale != copy:
            stale.unlink(missing_ok=True)
