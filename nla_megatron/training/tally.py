"""How many of a module's updates came to nothing, over a run and its resumptions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nla_megatron.errors import NotFinite

PATIENCE = 20
"""A module none of whose first updates had finite gradients will not learn."""


@dataclass
class Tally:
    """The updates of one module, which are the same on every rank."""

    made: int = 0
    skipped: int = 0

    def count(self, skipped: bool) -> None:
        self.made += 1
        self.skipped += skipped


def tallies_of(modules: Mapping[str, Any]) -> dict[str, Tally]:
    """Of those modules that learn by updates; a moving average, say, does not."""
    return {name: module.tally for name, module in modules.items() if hasattr(module, "tally")}


def recorded(modules: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """The tallies as a checkpoint keeps them."""
    return {name: asdict(tally) for name, tally in tallies_of(modules).items()}


def restore(modules: Mapping[str, Any], record: Mapping[str, Mapping[str, int]], steps: int) -> None:
    """Go on counting where a checkpoint of `steps` steps was; one that kept no tallies counts as having learned."""
    for name, tally in tallies_of(modules).items():
        found = record.get(name, {"made": steps, "skipped": 0})
        tally.made, tally.skipped = int(found["made"]), int(found["skipped"])


def check_learns(modules: Mapping[str, Any], last: bool) -> None:
    """Raises NotFinite, on all ranks, where a module has skipped every update: all of its run, or the first many.

    Args:
        last: whether the run ends here.
    """
    for name, tally in tallies_of(modules).items():
        if 0 < tally.made == tally.skipped and (last or tally.made >= PATIENCE):
            raise NotFinite(
                f"gradients of {name} that were not finite in each of its {tally.made} updates: nothing was learned",
                "a finite gradient", "look at the weights and the data that it starts from, or lower its lr",
            )  # fmt: skip
