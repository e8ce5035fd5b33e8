"""What a person reads is rounded, in words."""

from __future__ import annotations

from nla_megatron.evaluation.told import facts, table


def test_figures_are_rounded_and_named_and_intervals_stand_beside_their_estimates() -> None:
    figures = {
        "fve_gain": 0.5992450846728531, "fve_gain_ci95": [0.51234567, 0.69876543], "rows": 12345,
        "mse_av": float("nan"),
        "fve_rl_ci95": [-0.25, 0.5], "names": {"sport": 0.123456}, "compared": None, "enough": True,
    }  # fmt: skip
    assert facts(figures) == {
        "FVE gain": "0.599 (95 %: 0.512 to 0.699)", "Rows": "12,345", "MSE AV": "not measured",
        "FVE RL, 95 % interval": "−0.25 to 0.5", "Names: sport": "0.123", "Compared": "not measured", "Enough": "yes",
    }  # fmt: skip
    assert table({"fve": 0.25, "rows": 3}) == "FVE   0.25\nRows  3"


def test_what_an_fve_compares_with_is_said_in_words() -> None:
    figures = {"fve_av": 0.5, "fve_baseline": "training_rows", "fve_baseline_rows": 12345}
    assert facts(figures) == {
        "FVE AV": "0.5", "FVE compares with": "the mean activation of the 12,345 training rows",
    }  # fmt: skip
