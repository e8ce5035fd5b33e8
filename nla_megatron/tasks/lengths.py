"""The longest of many texts in tokens, without counting the tokens of all of them."""

from __future__ import annotations

from collections.abc import Callable

_CHECKED_ROWS, _COUNTED_ROWS = 20_000, 500


def longest_row(rows: int, text: Callable[[int], str], tokens: Callable[[int], int]) -> tuple[int, int]:
    """(row, its tokens) of the longest of `rows` texts, at least one.

    Those of most bytes are counted in tokens; of a very large source, among evenly spaced ones.
    """
    stride = -(-rows // _CHECKED_ROWS)
    sizes = {row: len(text(row).encode()) for row in range(0, rows, stride)}
    largest = sorted(sizes, key=lambda row: (-sizes[row], row))[:_COUNTED_ROWS]
    lengths = {row: tokens(row) for row in largest}
    longest = max(lengths, key=lambda row: lengths[row])
    return longest, lengths[longest]
