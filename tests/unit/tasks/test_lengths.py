"""The longest row is the one of most tokens, whatever its bytes, and not every text is counted."""

from __future__ import annotations

from nla_megatron.tasks.lengths import longest_row


def test_the_longest_is_counted_in_tokens_among_those_of_most_bytes() -> None:
    texts = ["a" * 30, "b c d e f", "ä" * 20, "one two"]
    assert longest_row(4, texts.__getitem__, lambda row: len(texts[row].split())) == (1, 5)


def test_of_many_texts_some_are_counted_the_largest_among_them() -> None:
    counted: list[int] = []

    def tokens(row: int) -> int:
        counted.append(row)
        return row

    assert longest_row(15_000, lambda row: "x" * (row % 1000), tokens)[0] % 1000 >= 900
    assert len(counted) == 500 and min(row % 1000 for row in counted) >= 966
    read: list[int] = []
    longest_row(60_001, lambda row: read.append(row) or "x", lambda row: 1)  # type: ignore[func-returns-value]
    assert len(read) <= 20_000 and max(read) > 59_000
