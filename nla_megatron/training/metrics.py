"""The scalars of each step: `metrics.jsonl` always, Weights & Biases and TensorBoard when switched on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, SupportsFloat

from nla_megatron.contract.journal import lines_of
from nla_megatron.disk import room_on
from nla_megatron.errors import ConfigError, RunDirectoryError

if TYPE_CHECKING:
    from nla_megatron.config.logger import LoggerOptions

METRICS_FILE = "metrics.jsonl"
RESERVED = ("step", "nonfinite")
Scalars = Mapping[str, int | float]


class Sink(Protocol):
    """One place where the scalars of a step go."""

    def write(self, step: int, scalars: Scalars) -> None: ...

    def close(self, failed: bool) -> None: ...


class MetricsLogger:
    """Writes the scalars of each step to its sinks; without sinks it is the null logger of the other ranks.

    Example:
        >>> with make_logger(config.logger, out_dir, "demo", active=rank == 0, resume_step=None) as logger:
        ...     logger.log(1, {"loss": 0.7, "lr": 1e-5})
    """

    def __init__(self, sinks: Sequence[Sink] = ()):
        self._sinks = tuple(sinks)
        self._last_step: int | None = None

    def log(self, step: int, scalars: Mapping[str, SupportsFloat]) -> None:
        """Record one step.

        Args:
            step: larger than every step logged before.
            scalars: name to number; NumPy scalars and 0-d tensors are welcome, NaN and infinity are kept visible.

        Raises:
            ValueError: a step that does not advance, or one of the names `step` and `nonfinite`.
        """
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(f"step {step} after step {self._last_step}: each step is logged once, in order")
        if taken := [name for name in RESERVED if name in scalars]:
            raise ValueError(f"scalars named {taken}: these names are fields of every line")
        self._last_step = step
        if not self._sinks:  # reading a scalar may wait for the device, which the null logger never does
            return
        numbers = {name: int(v) if isinstance(v, Integral) else float(v) for name, v in scalars.items()}
        for sink in self._sinks:
            sink.write(step, numbers)

    def close(self, failed: bool = False) -> None:
        """Flush and close every sink; `failed` marks the Weights & Biases run. A second call does nothing."""
        sinks, self._sinks = self._sinks, ()
        for sink in sinks:
            sink.close(failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)


def make_logger(
    config: LoggerOptions, out_dir: Path | str, run_name: str, active: bool, resume_step: int | None
) -> MetricsLogger:
    """The logger of this rank.

    Args:
        config: which sinks to open besides `metrics.jsonl`.
        out_dir: the stage's directory; made if absent.
        run_name: the name shown by Weights & Biases.
        active: true on rank 0; the others get a null logger and touch no file.
        resume_step: the first step that will be logged again; lines from there on belong to a killed run and go. None
            means the run starts at its beginning, so no line of an earlier attempt stays.

    Raises:
        ConfigError: a sink is switched on and its package is not installed.
        RunDirectoryError: `metrics.jsonl` holds something other than the lines of a run.
    """
    if not active:
        return MetricsLogger()
    folder, first_step = Path(out_dir), resume_step or 0
    folder.mkdir(parents=True, exist_ok=True)
    # The other sinks come first: a missing package is named before the lines of an earlier attempt are touched.
    extra: list[Sink] = []
    if config.tensorboard:
        extra.append(_TensorBoardSink(folder, first_step))
    if config.wandb:
        extra.append(_WandbSink(config, folder, run_name))
    return MetricsLogger([_JsonLinesSink(folder / METRICS_FILE, first_step), *extra])


class _JsonLinesSink:
    """One JSON line per step, flushed each step: a killed process loses at most the line it was writing."""

    def __init__(self, path: Path, first_step: int):
        self._path = path
        with room_on(path):
            _drop_steps_from(path, first_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, scalars: Scalars) -> None:
        nonfinite = [name for name, value in scalars.items() if not math.isfinite(value)]
        record: dict[str, object] = {"step": step}
        record.update((name, None if name in nonfinite else value) for name, value in scalars.items())
        if nonfinite:  # JSON has no NaN: null in the field, the name beside it
            record["nonfinite"] = nonfinite
        with room_on(self._path):
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()

    def close(self, failed: bool) -> None:
        with room_on(self._path):  # what a full disk has not taken is tried once more
            self._file.close()


def _drop_steps_from(path: Path, first_step: int) -> None:
    """Rewrite `path` with the lines of steps before `first_step`, each step once, through a temporary file."""
    if not path.exists():
        return
    kept = {step: line for step, line in _read_lines(path) if step < first_step}  # of a repeated step, the later line
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(kept[step] + "\n" for step in sorted(kept))
        file.flush()
        os.fsync(file.fileno())  # the rename must not reach the disk before the lines do
    os.replace(temporary, path)


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(step, line) of each line; a last line torn by a kill is left out, any other foreign line is an error."""
    for number, (line, row) in enumerate(lines_of(path, ("step",), torn=True)):
        if not isinstance(row["step"], int):
            raise RunDirectoryError(
                f"the step {row['step']!r} of record {number + 1} in {path}", "a number",
                "mend or remove the line, or choose another out=",
            )  # fmt: skip
        yield row["step"], line.decode("utf-8")


class _TensorBoardSink:
    """TensorBoard event files under `tensorboard/`; readers drop the events of a killed run from `first_step` on."""

    def __init__(self, folder: Path, first_step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard") from error
        self._writer = SummaryWriter(log_dir=str(folder / "tensorboard"), purge_step=first_step)

    def write(self, step: int, scalars: Scalars) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, global_step=step)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


class _WandbSink:
    """One Weights & Biases run per start of the program, under `wandb/`.

    A resumed run goes back some steps, which a Weights & Biases run refuses: each start is its own run, and the starts
    of one training run share a group.
    """

    def __init__(self, config: LoggerOptions, folder: Path, run_name: str):
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb") from error
        self._run = wandb.init(
            project=config.wandb_project,
            name=run_name,
            group=run_name,
            dir=str(folder),
            mode=config.wandb_mode,  # type: ignore[arg-type]  # checked by LoggerOptions
            settings=wandb.Settings(console="off"),  # the run's output stays the run's
        )

    def write(self, step: int, scalars: Scalars) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)


def _missing(package: str) -> ConfigError:
    return ConfigError(
        f"logger.{package}=true, and {package} is not installed",
        f"the package {package}",
        f"run `pip install {package}`, or set logger.{package}=false",
    )
