"""What a run has recorded of itself, up to a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from nla_megatron.errors import ConfigError
from nla_megatron.evaluation.runs import Run, check_alike, varying

ROWS = [{"step": step, "reward": float(10**step), **({"eval_fve": 0.5} if step == 1 else {})} for step in range(4)]
RUN = Run("a", Path("a"), {"seed": 3, "optim": {"lr": 0.1}}, [*ROWS, {"step": 4, "reward": None}])


def test_a_scalar_is_its_mean_over_the_last_steps_that_have_it() -> None:
    assert RUN.scalar("reward", 2) == (100 + 1000) / 2
    assert RUN.scalar("eval_fve", 2) == 0.5 and RUN.scalar("kl", 2) is None


def test_at_a_checkpoint_only_the_steps_before_it_count() -> None:
    """The checkpoint of step 2 is made when steps 0 and 1 are done."""
    assert RUN.scalar("reward", 1, until=2) == 10
    assert RUN.scalar("reward", 9, until=2) == (1 + 10) / 2
    assert RUN.scalar("eval_fve", 1, until=1) is None


def test_values_are_the_record_by_dotted_key() -> None:
    assert RUN.values == {"seed": 3, "optim.lr": 0.1} and RUN.seed == 3


def test_runs_on_one_table_are_alike_however_its_path_is_spelled(tmp_path: Path) -> None:
    table = tmp_path / "rows.jsonl"
    table.write_text("")
    spellings = [str(table), f"{tmp_path}/./rows.jsonl", f"{tmp_path / 'none.jsonl'}"]
    runs = [Run(str(number), tmp_path, {"data": path}, []) for number, path in enumerate(spellings)]
    check_alike(runs[:2])
    assert varying(runs[:2]) == [] and varying(runs) == ["data"]
    with pytest.raises(ConfigError, match=r"runs of different data: .*none.jsonl in 2"):
        check_alike(runs)
