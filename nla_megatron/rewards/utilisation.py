"""What a response's tokens were good for, against what was right without them. Shapes: N rollouts."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import MISSING
from torch import Tensor

from nla_megatron.errors import ConfigError, MissingFile, RewardError
from nla_megatron.reading import read_text
from nla_megatron.rewards.length import LengthOptions, LengthTerm
from nla_megatron.rewards.terms import named_values, register
from nla_megatron.types import Measured

_SHOWN = 5  # rows named in a message


@dataclass(frozen=True)
class UtilisationOptions(LengthOptions):
    """Who answered without thinking, and how lengths compare."""

    file: str = MISSING
    """JSONL with one line per row of the task's table: {"row": 17, "correct": 1}, the correctness from 0 to 1 of the
    policy before training when it answers at once. It is read at the start and never changes."""
    budget: int = MISSING
    """The length at which all of a response's room is used; in the configuration `${rollout.max_new_tokens}`."""
    correct_value: str = "correct"
    """The task's named value of what is right."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget < 1:
            raise ConfigError(f"budget={self.budget}", "at least 1", "raise it")


@register("token_utilisation")
class TokenUtilisation(LengthTerm):
    """What was gained over answering at once, less the room that was used to the degree that nothing changed.

    With c the response's correctness (0 where it is malformed), z that of the row's answer without thinking, and
    s = min(1, n / budget) the room that its n tokens take:
        r = (c - z) - (1 - |c - z|)·s
    So 1 where thinking turned a wrong answer into a right one, -1 where it spoilt a right one, both whatever the
    length; -s where the answer is as right or wrong as it was before.
    """

    options: UtilisationOptions

    def __init__(self, options: UtilisationOptions):
        super().__init__(options)
        self._zero_shot = read_zero_shot(options.file)

    def needs(self) -> tuple[str, ...]:
        return (*super().needs(), self.options.correct_value)

    def check_rows(self, count: int) -> None:
        absent = sorted(set(range(count)) - set(self._zero_shot))
        if absent:
            raise ConfigError(
                f"no line for {_named(absent)} in {self.options.file}",
                f"one line for each of the {count} rows of the table",
                "evaluate the policy before training on this very table",
            )

    def __call__(self, measured: Measured) -> Tensor:
        rows = [rollout.row for rollout in measured.rollouts]
        absent = sorted(set(rows) - set(self._zero_shot))
        if absent:
            raise RewardError(
                f"no line for {_named(absent)} in {self.options.file}, which the reward term {self.name!r} reads",
                "one line for each row of the task's table",
                "evaluate the policy before training on this very table",
            )
        correct_N = named_values(measured, self.options.correct_value, self.name).masked_fill(measured.failed, 0.0)
        gained_N = correct_N - torch.tensor([self._zero_shot[row] for row in rows])
        used_N = (self.lengths(measured) / self.options.budget).clamp_max(1)
        return gained_N - (1 - gained_N.abs()) * used_N


def read_zero_shot(path: str) -> dict[int, float]:
    """Row -> correctness without thinking.

    Raises:
        MissingFile: no such file.
        ConfigError: a line that cannot be read, or a second one for a row.
    """
    if not Path(path).is_file():
        raise MissingFile(f"no {path}", 'JSONL of {"row": …, "correct": …}', "correct the option file")
    found: dict[int, float] = {}
    for number, line in enumerate(read_text(path, ConfigError).split("\n"), start=1):
        if not line.strip():
            continue
        entry = _read(line)
        if entry is None:
            raise ConfigError(
                f"line {number} of {path}: {line[:80]}", '{"row": 17, "correct": 0 to 1}', "write the file again"
            )
        row, correct = entry
        if row in found:
            raise ConfigError(f"a second line for row {row}, {number} of {path}", "one per row", "remove one of them")
        found[row] = correct
    return found


def _read(line: str) -> tuple[int, float] | None:
    """Row and correctness of a line; None where they are not what they should be."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    if not isinstance(entry, dict):
        return None
    row, correct = entry.get("row"), entry.get("correct")
    if not isinstance(row, int) or isinstance(row, bool) or row < 0:
        return None
    if not isinstance(correct, bool | int | float) or not 0 <= correct <= 1:
        return None
    return row, float(correct)


def _named(rows: Collection[int]) -> str:
    shown = ", ".join(str(row) for row in list(rows)[:_SHOWN])
    return f"row{'s' * (len(rows) > 1)} {shown}" + (f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else "")
