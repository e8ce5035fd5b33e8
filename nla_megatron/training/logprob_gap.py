"""Sampler and trainer held together: what stops a step whose log-probs are apart, and what it leaves to be looked at.

Legend: N rollouts, T tokens of the longest sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nla_megatron.config.schema import RlConfig
from nla_megatron.contract.files import write_json_lines
from nla_megatron.contract.tokenizer import ModelTokenizer
from nla_megatron.errors import RolloutError
from nla_megatron.parallel.world import World
from nla_megatron.training.recorder import Place, nowhere
from nla_megatron.types import Rollout

WORST = 20
"""Responses that are written down."""


@dataclass(frozen=True)
class Apart:
    """A response whose log-probs differ: by `gap` nats at its token `token`, where they differ most."""

    rollout: Rollout
    trainer_logprobs: tuple[float, ...]
    gap: float
    token: int

    def record(self, tokenizer: ModelTokenizer, place: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A line of the file; the rollout's own fields are those of `rollout.record`.

        Args:
            place: where its row can be found again.
        """
        text = tokenizer.decode([self.rollout.response_ids[self.token]])
        found = {"gap": self.gap, "token": self.token, "token_text": text}
        # `token` is that of the response here.
        source = {{"token": "read_token"}.get(key, key): value for key, value in (place or {}).items()}
        return {**source, **found, **asdict(self.rollout), "trainer_logprobs": self.trainer_logprobs}


class GapCheck:
    """Stops a step above `rollout.max_logprob_gap`; `logprob_gap/step_*.jsonl` in the run's directory says where."""

    def __init__(self, config: RlConfig, tokenizer: ModelTokenizer, world: World, place: Place = nowhere):
        self.place = place
        self.limit, self.out, self.tokenizer, self.world = config.rollout.max_logprob_gap, config.out, tokenizer, world

    def __call__(
        self, rollouts: Sequence[Rollout], trainer: Callable[[], Tensor], number: int, statistics: dict[str, float]
    ) -> None:
        """Collective.

        Args:
            trainer: the trainer's log-probs (N, T) of the rollouts, asked for where something is wrong.
            number: of the step.
            statistics: of an update that is about to happen, with `logprob_gap_max`.

        Raises:
            RolloutError: sampler and trainer are further apart than the limit, or not comparable at all.
        """
        gap = statistics["logprob_gap_max"]
        if self.limit is None or gap <= self.limit:  # NaN is neither
            return
        worst = furthest(rollouts, trainer())[:WORST]
        path = Path(self.out) / "logprob_gap" / f"step_{number:08d}.jsonl"
        if self.world.is_main:
            write_json_lines(path, [apart.record(self.tokenizer, self.place(apart.rollout.row)) for apart in worst])
        first = worst[0]
        raise RolloutError(
            f"log-probs of sampler and trainer differ by {gap:.3g} at one token, number {first.token} of a response to "
            f"row {first.rollout.row}",
            f"at most rollout.max_logprob_gap={self.limit:g}",
            f"check the injection and the weight sync; the gap's usual floor is 1e-4 in fp32 and 0.02 in bf16; the "
            f"worst responses are in {path}",
        )


def furthest(rollouts: Sequence[Rollout], trainer_NT: Tensor) -> list[Apart]:
    """All responses, the one with the largest difference first; what is no number differs most."""
    found = []
    for rollout, row_T in zip(rollouts, trainer_NT.cpu(), strict=True):
        first = len(rollout.prompt_ids) - 1
        trainer = row_T[first : first + len(rollout.response_ids)]
        gaps = (trainer - torch.tensor(rollout.logprobs)).abs().nan_to_num(nan=torch.inf)
        if len(gaps):
            found.append(Apart(rollout, tuple(trainer.tolist()), float(gaps.max()), int(gaps.argmax())))
    return sorted(found, key=lambda apart: -apart.gap)
