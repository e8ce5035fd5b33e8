"""Seconds of a step's phases."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class PhaseClock:
    """Seconds per phase of one step; a phase that is entered again goes on counting."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        key = f"seconds_{name}"
        self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - start
