"""What tokens were good for, by hand, and files that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nla_megatron.config.schema import RewardConfig
from nla_megatron.errors import ConfigError, MissingFile, RewardError
from nla_megatron.rewards import make_reward
from nla_megatron.rewards.composition import Composed
from tests.support.measured import measured


def term(path: Path, rows: int | None = None, **options: Any) -> Composed:
    part = {"term": "token_utilisation", "options": {"file": str(path), "budget": 100, **options}}
    return make_reward(RewardConfig({"utilisation": part}), rows=rows)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Row 0 is right without thinking, row 1 wrong, row 2 right half of the time."""
    path = tmp_path / "zero_shot.jsonl"
    lines = [{"row": 0, "correct": True}, {"row": 1, "correct": 0}, {"row": 2, "correct": 0.5, "answer": "7"}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return path


def test_by_hand(file: Path) -> None:
    """In order: kept right, spoilt, won, still wrong, still wrong over the budget, half won, half lost."""
    seen = measured(
        ["a"] * 7,
        rows=[0, 0, 1, 1, 1, 2, 2],
        lengths=[25, 25, 90, 25, 400, 40, 40],
        correct=[1, 0, 1, 0, 0, 1, 0],
    )
    expected = [-0.25, -1.0, 1.0, -0.25, -1.0, 0.5 - 0.5 * 0.4, -0.5 - 0.5 * 0.4]
    assert term(file)(seen, 0).rewards.tolist() == pytest.approx(expected, abs=1e-7)


def test_a_malformed_response_is_wrong_whatever_the_task_says(file: Path) -> None:
    seen = measured([None, None], rows=[0, 1], lengths=[50, 50], correct=[1, 1])
    assert term(file)(seen, 0).rewards.tolist() == [-1.0, -0.5]


def test_lengths_and_verdicts_can_be_the_tasks_own(file: Path) -> None:
    seen = measured(["a"], rows=[1], lengths=[50], solved=[0], thinking_tokens=[10])
    options = {"unit": "value", "value": "thinking_tokens", "correct_value": "solved"}
    reward = term(file, **options)
    assert reward(seen, 0).rewards.tolist() == pytest.approx([-0.1])
    assert reward.needs == {"utilisation": ("thinking_tokens", "solved")}


def test_rows_that_the_file_lacks_are_named_before_the_run(file: Path) -> None:
    assert term(file, rows=3)
    with pytest.raises(ConfigError, match="no line for rows 3, 4, 5, 6, 7 and 2 more in .*zero_shot.jsonl"):
        term(file, rows=10)
    with pytest.raises(ConfigError, match="no line for row 3 in "):
        term(file, rows=4)


def test_a_row_that_the_file_lacks_is_named_when_it_comes(file: Path) -> None:
    with pytest.raises(RewardError, match="no line for row 8 in .*'token_utilisation'"):
        term(file)(measured(["a"], rows=[8], correct=[1]), 0)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("row 3: right", "line 2 of"),
        ("[3, 1]", "line 2 of"),
        ('{"row": 3}', "line 2 of"),
        ('{"row": "3", "correct": 1}', "line 2 of"),
        ('{"row": true, "correct": 1}', "line 2 of"),
        ('{"row": -1, "correct": 1}', "line 2 of"),
        ('{"row": 3, "correct": 2}', "line 2 of"),
        ('{"row": 3, "correct": NaN}', "line 2 of"),
        ('{"row": 0, "correct": 1}', "a second line for row 0, 2 of"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, line: str, found: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"row": 0, "correct": 1}\n' + line + "\n")
    with pytest.raises(ConfigError, match=found):
        term(path)


def test_a_file_that_is_not_there_and_a_budget_of_nothing_are_named(tmp_path: Path, file: Path) -> None:
    with pytest.raises(MissingFile, match="absent.jsonl"):
        term(tmp_path / "absent.jsonl")
    with pytest.raises(ConfigError, match="budget=0"):
        term(file, budget=0)
