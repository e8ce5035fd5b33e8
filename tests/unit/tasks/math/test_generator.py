"""Generated problems: the same for ever, and right by a reader that sees nothing but their text."""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction

import pytest

from nla_megatron.errors import ConfigError
from nla_megatron.tasks.math.generator import STORIES, WordProblems

# How a sentence changes the quantity, by words of its own; every sentence of every setting matches exactly one.
CHANGES = [
    (r"(\d+) times", lambda value, n: value * n),
    (r"(?:equally among|into|in) (\d+) (?:\w+ ){0,2}(?:baskets|shelves|parts|buses|bags|albums)", lambda v, n: v / n),
    (r"(?:sells|borrow|spends|buy|gives away) (\d+)", lambda value, n: value - n),
    (r"(\d+) passengers get off", lambda value, n: value - n),
    (r"(?:brings \w+|return|earns|Another|friend gives \w+) (\d+)", lambda value, n: value + n),
    (r"(\d+) passengers get on\b", lambda value, n: value + n),
]


def solved(question: str) -> Fraction:
    """The answer by reading: the first number, then what each sentence does to it."""
    first, *changes, ask = re.findall(r"[^.?]+[.?]", question)
    assert "How many" in ask and not re.search(r"\d", ask)
    value = Fraction(re.findall(r"\d+", first)[0])
    for sentence in changes:
        found = [(change, match) for pattern, change in CHANGES if (match := re.search(pattern, sentence))]
        assert len(found) == 1, sentence
        change, match = found[0]
        value = change(value, Fraction(match[1]))
        assert value.denominator == 1 and value >= 1, sentence
    return value


def test_every_answer_is_what_the_story_comes_to() -> None:
    problems = WordProblems(size=3000, seed=11)
    settings = Counter()
    for index in range(len(problems)):
        problem = problems.problem(index)
        assert problem.reference == str(solved(problem.question)), problem.question
        settings[problem.subject, problem.level] += 1
    assert set(settings) == {(name, level) for name in STORIES for level in "123"}, "all settings at all levels"
    assert min(settings.values()) > 100


def test_the_level_is_the_number_of_steps() -> None:
    problems = WordProblems(size=300, levels=(1, 3))
    for index in range(300):
        problem = problems.problem(index)
        assert problem.level == str(len(re.findall(r"[.?]", problem.question)) - 2)
    assert {problems.problem(index).level for index in range(300)} == {"1", "3"}


def test_a_problem_is_a_function_of_seed_and_number_alone() -> None:
    whole, later = WordProblems(size=50, seed=3), WordProblems(size=10, start=40, seed=3)
    assert [later.problem(index) for index in range(10)] == [whole.problem(40 + index) for index in range(10)]
    other = WordProblems(size=50, seed=4)
    assert sum(whole.problem(index) == other.problem(index) for index in range(50)) <= 2
    assert len({whole.problem(index).question for index in range(50)}) >= 48


def test_only_the_settings_asked_for_are_told() -> None:
    problems = WordProblems(size=40, templates=("bus", "bakery"))
    assert {problems.problem(index).subject for index in range(40)} == {"bus", "bakery"}


@pytest.mark.parametrize(
    ("options", "named"),
    [({"size": 0}, "size=0"), ({"start": -1}, "start=-1"), ({"levels": (4,)}, "levels=[4]"), ({"levels": ()}, "[]"),
     ({"templates": ("zoo",)}, "'zoo'")],
)  # fmt: skip
def test_options_out_of_range_are_named(options: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        WordProblems(**options)  # type: ignore[arg-type]
    assert named in caught.value.found
