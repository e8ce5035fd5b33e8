"""What an FVE is a fraction of, in words for whoever reads the figure."""

from __future__ import annotations

from typing import Any

TRAINING_ROWS = "training_rows"
GENERAL = "0 is what the mean of the training rows gets (of the evaluated ones, where a table does not know it)"
"""Of figures that may be of several tables."""


def denominator(whose: Any, rows: Any) -> str:
    """The mean predictor that a figure compares with: `fve_baseline` and `fve_baseline_rows` of an evaluation."""
    if whose is None:
        return "the mean activation of the evaluated rows"  # of evaluations from before there was any other
    count = f"{rows:,} " if isinstance(rows, int) else ""
    if whose == TRAINING_ROWS:
        return f"the mean activation of the {count}training rows"
    return f"the mean activation of the {count}evaluated rows themselves, since the table does not know another"
