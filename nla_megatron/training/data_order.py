"""Which rows a step sees, as a function of (seed, step): nothing to save, the same on every layout."""

from __future__ import annotations

import numpy as np


def rows_of_step(n_rows: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Rows `step * batch_size` and on of endless reshuffled epochs over `n_rows`."""
    rows: list[int] = []
    at = step * batch_size
    while len(rows) < batch_size:
        epoch, offset = divmod(at, n_rows)
        order = np.random.default_rng([seed, epoch]).permutation(n_rows)
        taken = order[offset : offset + batch_size - len(rows)].tolist()
        rows += taken
        at += len(taken)
    return rows
