"""Word problems without a file: a story of one quantity that changes one to three times, with whole numbers throughout.

Problem `index` is a function of (seed, index) alone. Its level is the number of steps; numbers grow with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from nla_megatron.errors import ConfigError
from nla_megatron.tasks.math.problems import Problem, register

LEVELS = (1, 2, 3)
_LARGEST = {1: 20, 2: 50, 3: 100}
_STREAM = 6
"""Sets these draws apart from other uses of the same seed."""


@dataclass(frozen=True)
class Story:
    """Sentences of one setting: how the quantity starts, changes, and is asked for. `{n}` is the step's number."""

    start: str
    add: str
    subtract: str
    multiply: str
    divide: str
    ask: str


STORIES: dict[str, Story] = {
    "market": Story(
        "{name} has {n} apples.",
        "A neighbour brings {name} {n} more apples.",
        "{name} sells {n} of the apples.",
        "Then {name} picks enough to have {n} times as many apples as before.",
        "{name} shares the apples equally among {n} baskets and keeps one basket.",
        "How many apples does {name} have now?",
    ),
    "library": Story(
        "A shelf of {name}'s library holds {n} books.",
        "Visitors return {n} books to the shelf.",
        "Visitors borrow {n} books from the shelf.",
        "After a donation the shelf holds {n} times as many books.",
        "The books are divided equally among {n} shelves, and only the first shelf is counted from now on.",
        "How many books are on the shelf?",
    ),
    "savings": Story(
        "{name} starts the week with {n} dollars.",
        "{name} earns {n} dollars.",
        "{name} spends {n} dollars.",
        "A bonus makes the money {n} times what it was.",
        "{name} splits the money into {n} equal parts and keeps one part.",
        "How many dollars does {name} have at the end?",
    ),
    "bus": Story(
        "A bus that {name} drives leaves with {n} passengers.",
        "At the next stop {n} passengers get on.",
        "At the next stop {n} passengers get off.",
        "At the station the number of passengers becomes {n} times as large.",
        "The passengers change in equal groups into {n} smaller buses, and {name} drives one of them.",
        "How many passengers are on the bus of {name}?",
    ),
    "bakery": Story(
        "{name} bakes {n} rolls in the morning.",
        "Another {n} rolls come out of the oven.",
        "Customers buy {n} rolls.",
        "An order makes {name} bake until there are {n} times as many rolls.",
        "{name} packs the rolls equally into {n} bags and one bag is left over for lunch; the others are sold.",
        "How many rolls does {name} have left?",
    ),
    "collection": Story(
        "{name} collects stamps and owns {n} of them.",
        "A friend gives {name} {n} stamps.",
        "{name} gives away {n} stamps.",
        "A year later the collection is {n} times as large.",
        "{name} arranges the stamps in {n} albums of equal size and keeps one album.",
        "How many stamps does {name} own now?",
    ),
}
NAMES = ("Ada", "Ben", "Chen", "Dora", "Elif", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kemal", "Lena")

_DO: dict[str, Callable[[int, int], int]] = {
    "add": lambda value, n: value + n,
    "subtract": lambda value, n: value - n,
    "multiply": lambda value, n: value * n,
    "divide": lambda value, n: value // n,
}


@register("generated")
@dataclass
class WordProblems:
    """`size` problems from number `start` on. `levels`: 1, 2 or 3 steps, drawn evenly. `templates`: settings to draw
    from; none are all. A held-out set is another `start`, or another `seed`.
    """

    size: int = 10_000
    start: int = 0
    seed: int = 0
    levels: tuple[int, ...] = LEVELS
    templates: tuple[str, ...] = ()
    unreadable: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if self.size < 1 or self.start < 0 or self.seed < 0:
            raise ConfigError(
                f"size={self.size}, start={self.start}, seed={self.seed} of generated problems",
                "a size of 1 or more, start and seed of 0 or more", "correct the options",
            )  # fmt: skip
        if not self.levels or not set(self.levels) <= set(LEVELS):
            raise ConfigError(f"levels={list(self.levels)}", f"some of {list(LEVELS)}", "correct levels")
        if unknown := sorted(set(self.templates) - set(STORIES)):
            raise ConfigError(f"template {unknown[0]!r}", f"some of {', '.join(STORIES)}", "correct templates")

    def __len__(self) -> int:
        return self.size

    def problem(self, index: int) -> Problem:
        if not 0 <= index < self.size:
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, _STREAM, self.start + index])
        level = int(rng.choice(self.levels))
        setting = str(rng.choice(self.templates or tuple(STORIES)))
        story, name = STORIES[setting], str(rng.choice(NAMES))
        value = int(rng.integers(2, _LARGEST[level] + 1))
        sentences = [story.start.format(name=name, n=value)]
        for _ in range(level):
            step, n = _step(rng, value, _LARGEST[level])
            sentences.append(getattr(story, step).format(name=name, n=n))
            value = _DO[step](value, n)
        sentences.append(story.ask.format(name=name))
        return Problem(" ".join(sentences), str(value), str(level), setting)


def _step(rng: np.random.Generator, value: int, largest: int) -> tuple[str, int]:
    """A change that keeps the quantity whole and at least 1, and what it changes by."""
    divisors = [n for n in range(2, 10) if value % n == 0 and value > n]
    possible = ["add", "multiply", *(["subtract"] if value > 1 else []), *(["divide"] if divisors else [])]
    step = str(rng.choice(possible))
    if step == "add":
        return step, int(rng.integers(1, largest + 1))
    if step == "subtract":
        return step, int(rng.integers(1, value))
    return step, int(rng.choice(divisors)) if step == "divide" else int(rng.integers(2, 6))
