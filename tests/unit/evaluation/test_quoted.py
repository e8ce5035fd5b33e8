"""The last words of a text, as they stand."""

from __future__ import annotations

import pytest

from nla_megatron.config.compose import compose
from nla_megatron.errors import ConfigError
from nla_megatron.evaluation.held_out import last_words


@pytest.mark.parametrize(
    ("text", "count", "quoted"),
    [
        ("one two three", 2, "two three"),
        ("one\n  two\tthree \n", 2, "two\tthree"),
        (" one", 40, "one"),
        ("", 3, ""),
        (" \n", 3, ""),
        ("naïve 中文 word", 2, "中文 word"),
    ],
)
def test_space_between_the_words_stays(text: str, count: int, quoted: str) -> None:
    assert last_words(text, count) == quoted


def test_a_negative_count_is_named() -> None:
    with pytest.raises(ConfigError, match="quote_words"):
        compose("eval", ["out=somewhere", "quote_words=-1"])
