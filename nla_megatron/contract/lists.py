"""A column whose rows hold any number of vectors, side by side, read through the map. Shapes: N rows, D width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nla_megatron.errors import ColumnError

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, eq=False)
class Lists:
    """Views of the column's chunks.

    Attributes:
        name, path, d_model: the column, its file, and D.
        vectors: how many vectors each row holds, (rows,) int64.
    """

    name: str
    path: Path
    d_model: int
    vectors: np.ndarray
    _values: tuple[np.ndarray, ...]  # of each chunk, all rows side by side
    _offsets: tuple[np.ndarray, ...]  # where each of its rows begins, and where the last one ends
    _starts: np.ndarray  # first row of each chunk

    @classmethod
    def of(cls, column: pa.ChunkedArray, name: str, d_model: int, path: Path) -> Lists:
        """Raises ColumnError where a row's list is null, holds nulls, or holds no whole number of vectors."""
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        if column.null_count or any(chunk.flatten().null_count for chunk in chunks):
            raise ColumnError(
                f"column {name!r} in {str(path)!r} has nulls", "lists of numbers, empty where a row has one activation",
                "extract the activations again",
            )  # fmt: skip
        offsets = tuple(chunk.offsets.to_numpy().astype(np.int64) for chunk in chunks)
        sizes = np.concatenate([np.empty(0, np.int64), *map(np.diff, offsets)])
        uneven = np.flatnonzero(sizes % d_model)
        if uneven.size:
            raise ColumnError(
                f"column {name!r} in {str(path)!r} holds {sizes[uneven[0]]} numbers in row {uneven[0]}",
                f"whole vectors of width {d_model}", "write the table again",
            )  # fmt: skip
        starts = np.cumsum([0, *(len(chunk) for chunk in chunks)])[:-1]
        values = tuple(chunk.values.to_numpy() for chunk in chunks)
        return cls(name, path, d_model, sizes // d_model, values, offsets, starts)

    def of_row(self, row: int) -> np.ndarray:
        """The vectors of a row side by side, a view. Raises ColumnError where a number is not finite."""
        chunk = int(np.searchsorted(self._starts, row, side="right")) - 1
        first, stop = self._offsets[chunk][row - self._starts[chunk] :][:2]
        values = self._values[chunk][first:stop]
        check_finite(self.name, self.path, values[None], np.array([row]))
        return values

    def before(self, own_ND: np.ndarray, rows: Sequence[int] | np.ndarray, positions: int) -> np.ndarray:
        """The vectors of rows, `own_ND` behind them, and NaN in front where there are fewer: (N, positions, D)."""
        out_NKD = np.full((len(own_ND), positions, self.d_model), np.nan, dtype=np.float32)
        out_NKD[:, -1] = own_ND
        for row, out_KD in zip(rows, out_NKD, strict=True):
            values_KD = self.of_row(int(row)).reshape(-1, self.d_model)
            assert len(values_KD) < positions, "checked against the sidecar"
            out_KD[positions - 1 - len(values_KD) : -1] = values_KD
        return out_NKD


def check_finite(name: str, path: Path, values_NW: np.ndarray, rows_N: np.ndarray) -> None:
    """Raises ColumnError where a number of a column is not finite; `rows_N` for the message."""
    bad = rows_N[~np.isfinite(values_NW).all(axis=1)]
    if bad.size:
        raise _not_finite(name, path, bad[0])


def check_finite_rows(name: str, path: Path, column: pa.Array, start: int) -> None:
    """Raises ColumnError where a vector of a column's part, which begins at the row `start`, is not finite."""
    values = column.flatten()  # of a row without a value there are none
    if values.null_count or np.isfinite(values.to_numpy()).all():  # nulls are named by those who read the column
        return
    row = next(at for at, one in enumerate(column) if one.is_valid and not np.isfinite(one.values.to_numpy()).all())
    raise _not_finite(name, path, start + row)


def _not_finite(name: str, path: Path, row: int) -> ColumnError:
    return ColumnError(
        f"column {name!r} in {str(path)!r} is not finite in row {row}", "finite numbers",
        "extract the activations again, in a wider dtype if the model overflows",
    )  # fmt: skip
