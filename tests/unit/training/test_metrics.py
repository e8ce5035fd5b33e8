"""What `metrics.jsonl`, Weights & Biases and TensorBoard hold after runs that end well, badly, and twice."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from nla_megatron.config.logger import LoggerOptions
from nla_megatron.errors import ConfigError, RunDirectoryError
from nla_megatron.training.metrics import MetricsLogger, make_logger


def open_logger(folder: Path, resume_step: int | None = None, **options: object) -> MetricsLogger:
    return make_logger(LoggerOptions(**options), folder, "a run", active=True, resume_step=resume_step)  # type: ignore[arg-type]


def read(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def log_steps(logger: MetricsLogger, first: int, last: int, tag: float) -> None:
    for step in range(first, last):
        logger.log(step, {"loss": tag})


def test_each_step_is_on_disk_before_the_next_one_begins(tmp_path: Path) -> None:
    logger = open_logger(tmp_path)
    for step in range(3):
        logger.log(step, {"loss": 0.5 * step})
        assert read(tmp_path)[-1] == {"step": step, "loss": 0.5 * step}
    logger.close()
    assert len(read(tmp_path)) == 3


def test_a_resumed_run_holds_each_step_exactly_once(tmp_path: Path) -> None:
    with open_logger(tmp_path) as logger:
        log_steps(logger, 0, 10, tag=1.0)
    with open_logger(tmp_path, resume_step=6) as logger:
        log_steps(logger, 6, 9, tag=2.0)
    assert [row["step"] for row in read(tmp_path)] == list(range(9))
    assert [row["loss"] for row in read(tmp_path)] == [1.0] * 6 + [2.0] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "torn", [b'{"step": 4, "lo', b'{"step": 4, "loss": 1.0', b"\x00\x00\x00", b'{"step": 4, "name": "\xe2\x82']
)
def test_a_torn_last_line_is_dropped_even_when_its_step_would_stay(tmp_path: Path, torn: bytes) -> None:
    with open_logger(tmp_path) as logger:
        log_steps(logger, 0, 4, tag=1.0)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    with open_logger(tmp_path, resume_step=5) as logger:
        logger.log(5, {"loss": 2.0})
    assert [row["step"] for row in read(tmp_path)] == [0, 1, 2, 3, 5]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}')
    with open_logger(tmp_path, resume_step=2) as logger:
        logger.log(2, {})
    assert [row["step"] for row in read(tmp_path)] == [0, 1, 2]


def test_of_a_repeated_step_the_later_line_stays_in_the_order_of_steps(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "v": 1}\n{"step": 0, "v": 1}\n{"step": 0, "v": 2}\n')
    open_logger(tmp_path, resume_step=2).close()
    assert read(tmp_path) == [{"step": 0, "v": 2}, {"step": 1, "v": 1}]


def test_a_run_that_starts_anew_keeps_no_line_of_the_attempt_before(tmp_path: Path) -> None:
    with open_logger(tmp_path) as logger:
        log_steps(logger, 0, 3, tag=1.0)
    with open_logger(tmp_path, resume_step=None) as logger:
        logger.log(0, {"loss": 2.0})
    assert read(tmp_path) == [{"step": 0, "loss": 2.0}]


def test_a_foreign_line_inside_the_file_stops_the_run_and_leaves_the_file(tmp_path: Path) -> None:
    before = '{"step": 0}\nnot ours\n{"step": 1}\n'
    (tmp_path / "metrics.jsonl").write_text(before)
    with pytest.raises(RunDirectoryError, match="line 2 of .*not ours"):
        open_logger(tmp_path, resume_step=1)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_nan_and_infinity_become_null_and_are_named(tmp_path: Path) -> None:
    with open_logger(tmp_path) as logger:
        logger.log(0, {"loss": float("nan"), "norm": float("-inf"), "lr": 0.1})
        logger.log(1, {"loss": 1.0})
    first, second = read(tmp_path)
    assert first == {"step": 0, "loss": None, "norm": None, "lr": 0.1, "nonfinite": ["loss", "norm"]}
    assert "nonfinite" not in second


def test_numpy_scalars_and_zero_dimensional_tensors_are_numbers(tmp_path: Path) -> None:
    with open_logger(tmp_path) as logger:
        logger.log(0, {"a": np.float32(0.5), "b": np.int64(7), "c": torch.tensor(0.25)})
    assert read(tmp_path) == [{"step": 0, "a": 0.5, "b": 7, "c": 0.25}]
    assert isinstance(read(tmp_path)[0]["b"], int)


@pytest.mark.parametrize("step", [4, 3])
def test_a_step_that_does_not_advance_is_refused(tmp_path: Path, step: int) -> None:
    with open_logger(tmp_path) as logger:
        logger.log(4, {})
        with pytest.raises(ValueError, match=f"step {step} after step 4"):
            logger.log(step, {})
    assert len(read(tmp_path)) == 1


@pytest.mark.parametrize("name", ["step", "nonfinite"])
def test_the_fields_of_every_line_are_no_names_for_scalars(tmp_path: Path, name: str) -> None:
    with open_logger(tmp_path) as logger, pytest.raises(ValueError, match=name):
        logger.log(0, {name: 1.0})


def test_the_null_logger_touches_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = LoggerOptions(wandb=True, tensorboard=True)
    with make_logger(options, folder, "a run", active=False, resume_step=None) as logger:
        logger.log(0, {"loss": 1.0})
    assert not folder.exists()


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    logger = open_logger(tmp_path)
    logger.close()
    logger.close()
    assert read(tmp_path) == []


def test_tensorboard_reads_back_each_step_once_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )

    with open_logger(tmp_path, tensorboard=True) as logger:
        log_steps(logger, 0, 6, tag=1.0)
    with open_logger(tmp_path, resume_step=4, tensorboard=True) as logger:
        log_steps(logger, 4, 8, tag=2.0)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        *((step, 1.0) for step in range(4)),
        *((step, 2.0) for step in range(4, 8)),
    ]
    assert len(read(tmp_path)) == 8


def test_wandb_writes_an_offline_run_into_the_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with open_logger(tmp_path, wandb=True) as logger:
        logger.log(0, {"loss_of_this_test": 1.5})
        logger.log(1, {"loss_of_this_test": float("nan")})
    (run,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 30  # another process writes it, which may be behind on a busy machine
    while b"loss_of_this_test" not in run.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert b"loss_of_this_test" in run.read_bytes()
    assert len(read(tmp_path)) == 2


@pytest.mark.parametrize(("option", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_switched_on_sink_that_is_not_installed_is_named_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=f"pip install {option}"):
        open_logger(tmp_path, **{option: True})
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_wandb_mode_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="offlin'"):
        LoggerOptions(wandb_mode="offlin")
