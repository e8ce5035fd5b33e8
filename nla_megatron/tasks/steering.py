"""A frozen model answers steered and left alone: what its requests carry, and the comparison of the two.

Legend: N requests, S strengths of all interventions side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch

from nla_megatron.interventions.placement import Span, touched
from nla_megatron.models.strength import columns_of
from nla_megatron.tasks.sae_rows import names_of
from nla_megatron.tasks.steering_report import Comparison, Side, strength_statistics
from nla_megatron.tasks.text import TextTask, no_vectors

if TYPE_CHECKING:
    from torch import Tensor

    from nla_megatron.interventions.spec import Intervention
    from nla_megatron.rollout.requests import PromptRequest, Vectors
    from nla_megatron.types import Measured, Rollout, RolloutBatch

_AT_ONCE = 256
"""Prompts between two advances of a progress bar."""

RewardOf = Callable[["Measured", int], "Tensor"]
"""From what was measured of N responses, and the step of training, to rewards (N,)."""


class Answering(Protocol):
    """What a comparison asks of the sampler; `rollout.engine.Engine` says more. Every method is collective."""

    def generate(
        self, requests: Sequence[PromptRequest], vectors: Vectors, samples: int, training_step: int = 0
    ) -> RolloutBatch: ...

    def changed_tokens(self) -> int: ...


def steered(
    requests: Sequence[PromptRequest], strengths_NS: Tensor, interventions: Sequence[Intervention]
) -> list[PromptRequest]:
    """The requests with their strengths, each intervention's own."""
    columns = columns_of(interventions)
    return [
        replace(request, strengths=tuple(None if part is None else tuple(row[part[0] : part[1]]) for part in columns))
        for request, row in zip(requests, strengths_NS.tolist(), strict=True)
    ]


def steered_tokens(
    interventions: Sequence[Intervention], rollouts: Sequence[Rollout], positions: Sequence[int] = ()
) -> int:
    """Tokens that the interventions change, one after the other; the last token of a response is never an input.

    Args:
        positions: in the prompts, for interventions at positions.
    """
    total = 0
    for rollout in rollouts:
        prompt = len(rollout.prompt_ids)
        span = Span(0, prompt + len(rollout.response_ids) - 1, prompt)
        total += sum(len(part) for each in interventions for part in touched(each.where, span, positions))
    return total


def compared(
    task: TextTask, engine: Answering, interventions: Sequence[Intervention], requests: Sequence[PromptRequest],
    step: int, reward: RewardOf | None, samples: int, advance: Callable[[int], None] | None = None,
) -> Comparison:  # fmt: skip
    """Both sides on the same prompts and seeds; collective. The second one takes none of the interventions.

    Args:
        requests: with their strengths.
        step: of training, for schedules over it.
        advance: told how many prompts were answered, of either side, now and then.
    """
    on, applied = _answers(engine, requests, samples, step, advance)
    alone = [replace(each, only=(), strengths=None) for each in requests]
    off, _ = _answers(engine, alone, samples, step, advance)
    wanted = steered_tokens(interventions, on)
    parts = [[value for part in each.strengths or () if part is not None for value in part] for each in requests]
    figure, steered_side = _side(task, on, reward, step)
    return Comparison(
        step=step + 1,
        rows=tuple(rollout.row for rollout in on),
        samples=tuple(rollout.sample for rollout in on),
        prompts=tuple(task.text(rollout.row) for rollout in on),
        figure=figure,
        steered=steered_side,
        plain=_side(task, off, reward, step)[1],
        strengths=strength_statistics(torch.tensor(parts), names_of(interventions)),
        applied=applied,
        failed=max(0, wanted - applied),
        places=tuple(task.place(rollout.row) for rollout in on),
    )


def _answers(
    engine: Answering, requests: Sequence[PromptRequest], samples: int, step: int, advance: Callable[[int], None] | None
) -> tuple[list[Rollout], int]:
    """Responses in the order of requests and samples, and how many tokens were changed."""
    rollouts: list[Rollout] = []
    applied = 0
    for start in range(0, len(requests), _AT_ONCE):
        part = requests[start : start + _AT_ONCE]
        rollouts += engine.generate(part, no_vectors, samples, step).rollouts
        applied += engine.changed_tokens()
        if advance is not None:
            advance(len(part))
    return rollouts, applied


def _side(task: TextTask, rollouts: Sequence[Rollout], reward: RewardOf | None, step: int) -> tuple[str, Side]:
    """One side, and the name of its `values`."""
    measured = task.measure(rollouts)
    figure, values_N = task.main(measured)
    figures = {name: float(value) for name, value in task.figures(measured).items() if isinstance(value, int | float)}
    return figure, Side(
        rewards=None if reward is None else tuple(reward(measured, step).tolist()),
        texts=tuple(task.response_text(rollout) for rollout in rollouts),
        tokens=tuple(len(rollout.response_ids) for rollout in rollouts),
        figures=figures,
        values=tuple(values_N.tolist()),
    )
