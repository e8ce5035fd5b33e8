"""What held-out figures are measured on and by: rows by document, the mean of the training rows, what is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nla_megatron.contract import columns
from nla_megatron.contract.baseline import baseline_path, write_baseline
from nla_megatron.contract.sidecar import read_dataset_sidecar, write_dataset_sidecar
from nla_megatron.errors import ConfigError, MissingFile, NlaError, SidecarError
from nla_megatron.tasks.nla import NlaTask
from nla_megatron.tasks.nla_held_out import EVALUATED_ROWS, TRAINING_ROWS, Baseline, Measure, check_rows, held_out_rows
from tests.support.tiny import tiny_rows, tiny_table

MEAN = np.linspace(-1, 1, 64, dtype=np.float32)


@pytest.fixture
def table(model_dir: Path, tmp_path: Path) -> Path:
    """16 documents of 3 rows; the mean of 1,000 rows beside them."""
    path = tiny_table(tmp_path / "rl.parquet", model_dir, "rl", tiny_rows(64))
    recorded(path, write_baseline(path, MEAN, 1000, "sqrt_d_model"))
    return path


def recorded(path: Path, spec: object) -> None:
    write_dataset_sidecar(path, replace(read_dataset_sidecar(path), baseline=spec))  # type: ignore[arg-type]


def task_of(path: Path, model_dir: Path) -> NlaTask:
    return NlaTask.open(str(path), "rl", str(model_dir))


def test_rows_are_drawn_document_by_document(table: Path, model_dir: Path) -> None:
    task = task_of(table, model_dir)
    documents = task.table.column(columns.DOC_ID)
    for count, of_each in ((5, {1}), (16, {1}), (20, {1, 2}), (32, {2}), (48, {3}), (99, {3})):
        rows = held_out_rows(task, count, 0)
        assert len(set(rows)) == len(rows) == min(count, 48)
        found = Counter(documents[row] for row in rows)
        assert set(found.values()) == of_each and len(found) == min(count, 16)
        assert rows == held_out_rows(task, 99, 0)[:count], "fewer are the first of more"
    drawn = [held_out_rows(task, 16, seed) for seed in range(4)]
    assert len({tuple(rows) for rows in drawn}) == 4
    assert {row % 3 for rows in drawn for row in rows} == {0, 1, 2}, "not the first row of each document alone"


def test_an_fve_is_a_fraction_of_what_the_training_mean_leaves(table: Path, model_dir: Path) -> None:
    """By hand in float64; beside it the figure that the rows' own mean gives, which is lower."""
    task = task_of(table, model_dir)
    rows = held_out_rows(task, 30, 1)
    vectors = task.table.vectors(rows).astype(np.float64)
    targets = vectors / np.linalg.norm(vectors, axis=1, keepdims=True) * 8
    mse = torch.rand(30, generator=torch.Generator().manual_seed(0))
    baseline = Baseline.of(task)
    measure = Measure.of(task, baseline, rows)
    expected = 1 - float(mse.double().sum()) / np.square(targets - MEAN).mean(axis=1).sum()
    in_sample = 1 - float(mse.double().sum()) / np.square(targets - targets.mean(axis=0)).mean(axis=1).sum()
    assert (baseline.whose, baseline.rows, baseline.note(task)) == (TRAINING_ROWS, 1000, None)
    assert measure.fve(mse).value == pytest.approx(expected, abs=1e-6)
    assert measure.fve_in_sample(mse) == pytest.approx(in_sample, abs=1e-6) and in_sample < expected
    assert measure.variance == pytest.approx(np.square(targets - MEAN).mean(), abs=1e-5)
    assert measure.gain(mse, 2 * mse).value == pytest.approx(1 - expected, abs=1e-6)
    assert measure.fve(mse).low < expected < measure.fve(mse).high


def test_a_table_that_knows_no_training_mean_is_measured_by_its_own_and_says_so(table: Path, model_dir: Path) -> None:
    recorded(table, None)
    task = task_of(table, model_dir)
    baseline, mse = Baseline.of(task), torch.full((9,), 0.5)
    measure = Measure.of(task, baseline, held_out_rows(task, 9, 0))
    assert baseline.whose == EVALUATED_ROWS
    assert "mean of the evaluated rows" in str(baseline.note(task)) and str(table) in str(baseline.note(task))
    assert measure.fve(mse).value == pytest.approx(measure.fve_in_sample(mse))


def without_file(path: Path) -> None:
    baseline_path(path).unlink()


def other_numbers(path: Path) -> None:
    np.save(baseline_path(path), MEAN + 1)


def cut_short(path: Path) -> None:
    baseline_path(path).write_bytes(baseline_path(path).read_bytes()[:-4])


def other_width(path: Path) -> None:
    recorded(path, write_baseline(path, MEAN[:32], 1000, "sqrt_d_model"))


def other_scale(path: Path) -> None:
    recorded(path, write_baseline(path, MEAN, 1000, 2.0))


def of_no_rows(path: Path) -> None:
    recorded(path, write_baseline(path, MEAN, 0, "sqrt_d_model"))


@pytest.mark.parametrize(
    ("spoil", "kind", "found"),
    [
        (without_file, MissingFile, "rl.parquet.mean.npy"),
        (other_numbers, SidecarError, "checksum"),
        (cut_short, SidecarError, "checksum"),
        (other_width, SidecarError, "a mean of shape (32,)"),
        (other_scale, SidecarError, "baseline.scale = 2.0"),
        (of_no_rows, SidecarError, "'baseline.rows'"),
    ],
)
def test_a_mean_that_does_not_belong_to_its_table_is_refused(
    table: Path, model_dir: Path, spoil: Callable[[Path], None], kind: type[NlaError], found: str
) -> None:
    with pytest.raises(kind) as caught:
        spoil(table)
        Baseline.of(task_of(table, model_dir))
    assert type(caught.value) is kind and found in caught.value.found


@pytest.mark.parametrize(
    ("documents", "alike", "count", "found"),
    [
        (16, False, 1, "1 rows to evaluate"),
        (1, False, 3, "held-out rows of one document"),
        (4, True, 8, "8 rows of one and the same activation"),
    ],
)
def test_rows_that_measure_nothing_are_refused(
    model_dir: Path, tmp_path: Path, documents: int, alike: bool, count: int, found: str
) -> None:
    rows = tiny_rows(64, documents)
    if alike:
        rows[columns.VECTOR] = np.ones_like(rows[columns.VECTOR])
    task = task_of(tiny_table(tmp_path / "few.parquet", model_dir, "rl", rows), model_dir)
    with pytest.raises(ConfigError) as caught:
        check_rows(task, count, 0, "rows")
    assert caught.value.found.startswith(found)
