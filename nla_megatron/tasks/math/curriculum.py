"""Several sources of problems in one order: how much of each a step takes, and which problems those are.

All of it is a function of (seed, step) and of the row numbers that the loop draws, so nothing has to be saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nla_megatron.errors import ConfigError
from nla_megatron.tasks.math.problems import Problem, Provider

_STREAM = 7
"""Sets these draws apart from other uses of the same seed."""


@dataclass(frozen=True)
class Source:
    """`provider` with its `options`, and how much of it a step takes relative to the others."""

    provider: str
    options: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0


@dataclass(frozen=True)
class Stage:
    """From a step or an epoch on, other weights by source; a source that is not named has weight 0.

    An epoch is as many prompts as all sources have problems.
    """

    weights: dict[str, float]
    from_step: int | None = None
    from_epoch: int | None = None


class Mixture:
    """Problems of all sources under one numbering: those of the first source, then those of the second, ...

    Args:
        sources: by name, in order.
        weights: by name, before the first stage; at least one above 0.
        stages: in the order in which they begin, all by step or all by epoch.
        blend: weights move linearly from each stage's beginning to the next one's, in place of jumping there.

    Raises:
        ConfigError: weights that are negative, all zero or of unknown sources; stages that are out of order.
    """

    def __init__(
        self,
        sources: Mapping[str, Provider],
        weights: Mapping[str, float],
        stages: Sequence[Stage] = (),
        blend: bool = False,
        seed: int = 0,
    ):
        self.names, self.sources, self.seed, self.blend = tuple(sources), tuple(sources.values()), seed, blend
        self.sizes = np.array([len(source) for source in self.sources], dtype=np.int64)
        self.starts = np.cumsum([0, *self.sizes])[:-1]
        self.by_epoch = any(stage.from_epoch is not None for stage in stages)
        self.begins = [0, *(self._begin(stage) for stage in stages)]
        if any(later <= earlier for earlier, later in zip(self.begins[1:], self.begins[2:], strict=False)):
            raise ConfigError(
                f"stages that begin at {self.begins[1:]}", "each later than the one before", "order the stages"
            )
        self.shares = [self._share(weights), *(self._share(stage.weights) for stage in stages)]
        self.unreadable = sum(source.unreadable for source in self.sources)

    def __len__(self) -> int:
        return int(self.sizes.sum())

    def problem(self, row: int) -> Problem:
        source = self.source_of(row)
        return self.sources[source].problem(row - int(self.starts[source]))

    def source_of(self, row: int) -> int:
        """The number of the source that a row belongs to."""
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def share(self, step: int, prompts: int) -> np.ndarray:
        """What part of step `step` (0-based) of so many prompts each source gets, with sum 1."""
        at = step * prompts / len(self) if self.by_epoch else float(step)
        stage = int(np.searchsorted(self.begins[1:], at, side="right"))
        here = self.shares[stage]
        if not self.blend or stage + 1 == len(self.shares):
            return here
        begin, end = self.begins[stage], self.begins[stage + 1]
        done = (at - begin) / (end - begin)
        return (1 - done) * here + done * self.shares[stage + 1]

    def choose(self, rows: Sequence[int], step: int, at: int | None = None) -> list[int]:
        """The problems of a step in place of the rows that the loop drew from `len(self)`.

        Args:
            at: the step whose weights count, where `step` only tells draws apart.

        Each source gets the floor or the ceiling of its share, exactly its share on average over steps, at random
        places. Which of its problems follows from the row drawn for that place, and none comes twice in one call while
        the source has others. With one source the rows are taken as they are.
        """
        if len(self.sources) == 1:
            return list(rows)
        rng = np.random.default_rng([self.seed, _STREAM, step, *rows])
        edges = np.cumsum(self.share(step if at is None else at, len(rows)))
        points = (rng.random() + np.arange(len(rows))) / len(rows) * edges[-1]
        taken = np.minimum(np.searchsorted(edges, points, side="right"), len(edges) - 1)
        chosen: list[int] = []
        seen: set[int] = set()
        for row, source in zip(rows, rng.permutation(taken), strict=True):
            size, start = int(self.sizes[source]), int(self.starts[source])
            places = (start + (row + further) % size for further in range(size))
            place = next((each for each in places if each not in seen), start + row % size)
            seen.add(place)
            chosen.append(place)
        return chosen

    def _begin(self, stage: Stage) -> int:
        begin = stage.from_epoch if self.by_epoch else stage.from_step
        other = stage.from_step if self.by_epoch else stage.from_epoch
        if begin is None or other is not None or begin < 1:
            raise ConfigError(
                f"a stage with from_step={stage.from_step}, from_epoch={stage.from_epoch}",
                "one of them, 1 or more, and the same one in every stage", "correct the stages",
            )  # fmt: skip
        return begin

    def _share(self, weights: Mapping[str, float]) -> np.ndarray:
        if unknown := sorted(set(weights) - set(self.names)):
            raise ConfigError(
                f"a weight of {unknown[0]!r}", f"sources: {', '.join(self.names)}", "correct the stage's weights"
            )
        values = np.array([float(weights.get(name, 0.0)) for name in self.names])
        if not np.isfinite(values).all() or (values < 0).any() or not values.sum() > 0:
            raise ConfigError(
                f"weights {dict(weights)}", "numbers of 0 or more, one above 0", "correct the weights of the sources"
            )
        return values / values.sum()
