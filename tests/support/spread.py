"""Layouts on which end-to-end runs of `rl` are repeated: of tasks and layouts, what makes every pair meet."""

from __future__ import annotations

from tests.support.covering import chosen

LAYOUTS: dict[str, tuple[str, ...]] = {
    "tp2pp2": ("parallel=tp2pp2", "rollout=tp2"),
    "dp2": ("parallel=dp2", "rollout=single"),
    "tp2": ("parallel=tp2", "rollout=tp2"),
    "pp2": ("parallel=pp2", "rollout=tp2"),
}
"""What is typed for each, besides the run's own words."""
_TASKS = {"nla": tuple(LAYOUTS), "lexical": ("tp2", "pp2")}
_SPREAD = chosen(
    [(task, layout) for task, layouts in _TASKS.items() for layout in layouts],
    lambda run: (run[0], *(axis in run[1] for axis in ("tp2", "pp2", "dp2"))),
)


def layouts_of(task: str) -> dict[str, list[str]]:
    """The layouts of several processes for a task, with what is typed for each."""
    return {layout: list(LAYOUTS[layout]) for one, layout in _SPREAD if one == task}
