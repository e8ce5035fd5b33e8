"""Tables whose rows keep each a number of activations of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nla_megatron.contract import columns
from nla_megatron.contract.tables import Table, write_table
from nla_megatron.errors import ColumnError

D = 4


def rows(counts: list[int]) -> list[np.ndarray]:
    """The activations of each row, (K, D), its own last."""
    rng = np.random.default_rng(1)
    return [rng.standard_normal((count, D)).astype(np.float32) for count in counts]


def batch(kept: list[np.ndarray], preceding: Any = None) -> dict[str, Any]:
    return {
        "doc_id": [f"c:train:{row}" for row in range(len(kept))],
        "activation_vector": np.stack([each[-1] for each in kept]),
        "activation_layer": [3] * len(kept),
        "n_raw_tokens": list(range(len(kept))),
        "detokenized_text_truncated": ["text"] * len(kept),
        "preceding_vectors": [each[:-1].reshape(-1) for each in kept] if preceding is None else preceding,
    }


def written(path: Path, kept: list[np.ndarray], preceding: Any = None) -> Table:
    write_table(path, [batch(kept, preceding)], columns.schema("base", D, None))
    return Table.open(path, "base")


def test_rows_keep_each_their_own_number_and_come_back_whatever_way_they_are_asked_for(tmp_path: Path) -> None:
    """5000 rows: several row groups, and several chunks in the Arrow copy."""
    kept = rows([1 + row % 3 for row in range(5000)])
    table = written(tmp_path / "base.parquet", kept)
    assert (table.n_rows, table.positions, table.varies) == (5000, 3, True)
    assert table.activations.tolist() == [len(each) for each in kept]
    asked = [4999, 0, 2047, 2048, 2, 0]
    for row, before, read in zip(asked, table.preceding(asked), table.inputs(asked, 5), strict=True):
        np.testing.assert_array_equal(before, kept[row][:-1].reshape(-1))
        assert np.isnan(read[: 5 - len(kept[row])]).all()
        np.testing.assert_array_equal(read[5 - len(kept[row]) :], kept[row])
    assert table.inputs(asked).shape == (6, 3, D) and table.inputs([], 5).shape == (0, 5, D)
    np.testing.assert_array_equal(table.vectors(asked), [kept[row][-1] for row in asked])


def test_what_is_read_can_be_written_again(tmp_path: Path) -> None:
    kept = rows([2, 1, 3, 1])
    table = written(tmp_path / "base.parquet", kept)
    again = written(tmp_path / "again.parquet", kept, table.preceding(range(4)))
    np.testing.assert_array_equal(again.inputs(range(4)), table.inputs(range(4)))
    assert pq.read_schema(tmp_path / "again.parquet").field("preceding_vectors").type == pa.large_list(pa.float32())


def test_short_lists_of_another_program_are_read_too(tmp_path: Path) -> None:
    kept = rows([2, 1, 3])
    table = written(tmp_path / "base.parquet", kept)
    data = pq.read_table(tmp_path / "base.parquet")
    column = data.column("preceding_vectors").cast(pa.list_(pa.float32()))
    pq.write_table(data.set_column(data.column_names.index("preceding_vectors"), "preceding_vectors", column),
                   tmp_path / "theirs.parquet")  # fmt: skip
    theirs = Table.open(tmp_path / "theirs.parquet", "base")
    np.testing.assert_array_equal(theirs.inputs(range(3)), table.inputs(range(3)))


def test_where_no_row_keeps_more_than_its_own_there_are_still_lists(tmp_path: Path) -> None:
    table = written(tmp_path / "base.parquet", rows([1, 1]))
    assert (table.positions, table.varies) == (1, True) and table.inputs([1], 3).shape == (1, 3, D)


@pytest.mark.parametrize(
    ("preceding", "told"),
    [
        ([[1.0] * D, None, []], "'preceding_vectors' in .* has nulls"),
        ([[1.0] * D, [1.0] * (D - 1) + [None], []], "'preceding_vectors' in .* has nulls"),
        ([[1.0] * D, [], [1.0] * (D + 1)], "'preceding_vectors' in .* holds 5 numbers in row 2"),
    ],
)
def test_lists_that_are_not_of_whole_vectors_are_named(tmp_path: Path, preceding: Any, told: str) -> None:
    with pytest.raises(ColumnError, match=told):
        written(tmp_path / "base.parquet", rows([1, 1, 1]), preceding)


def test_a_row_without_an_activation_is_named(tmp_path: Path) -> None:
    values = batch(rows([1, 2]))
    values["activation_vector"] = [[1.0] * D, None]
    write_table(tmp_path / "base.parquet", [values], columns.schema("base", D, None))
    with pytest.raises(ColumnError, match="'activation_vector' in .* has nulls"):
        Table.open(tmp_path / "base.parquet", "base")


def test_a_number_that_is_none_is_named_with_its_row(tmp_path: Path) -> None:
    kept = rows([3, 2, 3])
    kept[2][0, 1] = np.nan
    with pytest.raises(ColumnError, match="'preceding_vectors' in .* is not finite in row 2"):
        written(tmp_path / "base.parquet", kept)


def test_the_markers_of_stored_prompts_are_counted_by_row(tmp_path: Path) -> None:
    kept = rows([1] * 3000)
    texts = ["a <INJECT> b" * (row % 4) for row in range(3000)]
    prompts = [[{"role": "system", "content": text}, {"role": "user", "content": "<INJECT>"}] for text in texts]
    values = {**batch(kept), "prompt": prompts, "api_explanation": [""] * 3000}
    write_table(tmp_path / "rl.parquet", [values], columns.schema("rl", D, None))
    assert Table.open(tmp_path / "rl.parquet", "rl").markers().tolist() == [1 + row % 4 for row in range(3000)]
