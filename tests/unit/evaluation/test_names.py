"""Which explanations name what was looked for."""

from __future__ import annotations

import pytest

from nla_megatron.config.compose import compose
from nla_megatron.errors import ConfigError
from nla_megatron.evaluation.held_out import named

TEXTS = [
    "Paris in spring",
    "die Straße",
    "New\nYork",
    "the parish",
    "PARIS.",
    None,
    "Comparison",
    "a C++ header",
    "C+ grade",
    "rue de l'opéra",
]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["Paris"], 2),
        (["paris", "spring"], 2),
        (["parish", "Paris"], 3),
        (["C++"], 1),
        (["op"], 0),
        (["opéra"], 1),
        (["ope\u0301ra"], 1),
        (["STRASSE"], 1),
        (["new york"], 1),
        (["new  york", "paris"], 3),
        ([" grade "], 1),
    ],
)
def test_whole_words_in_any_case(words: list[str], found: int) -> None:
    assert named(TEXTS, words) == found


@pytest.mark.parametrize("override", ["+names.city=[]", "+names.city=[Paris,' ']"])
def test_nothing_to_look_for_is_named(override: str) -> None:
    with pytest.raises(ConfigError, match="names.city"):
        compose("eval", ["out=somewhere", override])


def test_names_belong_to_explanations() -> None:
    with pytest.raises(ConfigError, match="names in the task lexical"):
        compose("eval", ["out=somewhere", "task=lexical", "+names.city=[Paris]"])
