"""What a task would say of a few rollouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from nla_megatron.types import Measured, Rollout


def rollout(group: int, sample: int, tokens: int, text: str, row: int | None = None) -> Rollout:
    """A response of `tokens` tokens to the prompt of `row` (its group, where nothing else is said)."""
    ids = tuple(range(tokens))
    return Rollout(group, sample, group if row is None else row, (1,), ids, (-1.0,) * tokens, text, True)


def measured(
    answers: Sequence[str | None],
    groups: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    references: Sequence[str | None] = (),
    rows: Sequence[int] | None = None,
    **values: Sequence[float],
) -> Measured:
    """One rollout per answer, in one group of their own where no groups are given; None is a malformed response."""
    groups = [0] * len(answers) if groups is None else groups
    rollouts = tuple(
        rollout(
            groups[i],
            sum(one == groups[i] for one in groups[:i]),
            1 if lengths is None else lengths[i],
            "no form" if answer is None else f"<answer>{answer}</answer>",
            None if rows is None else rows[i],
        )
        for i, answer in enumerate(answers)
    )
    named: Mapping[str, torch.Tensor] = {name: torch.tensor(list(map(float, one))) for name, one in values.items()}
    return Measured(rollouts, tuple(answers), named, tuple(references))
