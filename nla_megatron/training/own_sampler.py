"""The policy writes its responses itself, on any layout, without vLLM.

Every token takes a forward pass over the whole sequence: nothing is kept between tokens, so it is slow. Its log-probs
are the trainer's own.

Legend: B rows of a microbatch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from nla_megatron.config.schema import RlConfig, RolloutConfig
from nla_megatron.interventions.spec import Intervention
from nla_megatron.models.batching import Batch, response_mask
from nla_megatron.models.logprobs import response_logprobs, tempered
from nla_megatron.models.pipeline import Collect, forward_rows
from nla_megatron.parallel.world import World
from nla_megatron.rollout.requests import PromptRequest, Terms, Vectors
from nla_megatron.tasks.steering import steered_tokens
from nla_megatron.training.sides.base import Side
from nla_megatron.types import InjectionCount, Microbatch, Rollout, RolloutBatch


@dataclass
class _Response:
    """One that is being written."""

    request: PromptRequest
    sample: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False

    def noise(self, vocab_size: int) -> Tensor:
        """(V,) of Gumbel's distribution, a function of (seed, sample, token) alone: alike on every rank and layout."""
        seed = np.random.SeedSequence([self.request.seed, self.sample, len(self.ids)]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(seed >> 1))
        return -torch.empty(vocab_size).exponential_(generator=generator).log()


class PolicySampler:
    """A `training.sampler.Sampler`; the weights are the policy's, so there is nothing to hand over."""

    def __init__(self, config: RlConfig, side: Side, world: World):
        self.config, self.side, self.world = config.rollout, side, world
        self.micro_batch_size = config.micro_batch_size
        limit = min(config.rollout.max_model_len, side.shape.max_positions)
        shape = side.shape
        self.terms = Terms(tuple(side.interventions), shape.hidden_size, limit, side.marker, shape.vocab_size)
        self.end_ids, self.changed = side.tokenizer.end_ids, 0

    def generate(
        self, requests: Sequence[PromptRequest], vectors: Vectors, samples: int, training_step: int = 0
    ) -> RolloutBatch:
        """As `rollout.engine.Engine.generate`, and with its errors."""
        longest = self.config.max_new_tokens
        self.terms.check(requests, samples, [longest] * len(requests))
        responses = [_Response(request, sample) for request in requests for sample in range(request.samples or samples)]
        for _ in range(longest):
            unfinished = [response for response in responses if not response.finished]
            if not unfinished:
                break
            self._write(unfinished, vectors, training_step)
        rollouts = [self._rollout(response) for response in responses]
        return self._batch_of(rollouts, [response.request for response in responses])

    def score(
        self, recorded: Sequence[Rollout], asked_for: Sequence[PromptRequest], vectors: Vectors, training_step: int = 0
    ) -> RolloutBatch:
        """As `rollout.engine.Engine.score`, and with its errors."""
        requests = [request.again(rollout) for request, rollout in zip(asked_for, recorded, strict=True)]
        self.terms.check(requests, 1, [len(rollout.response_ids) for rollout in recorded])
        written = [
            _Response(request, rollout.sample, list(rollout.response_ids), finished=rollout.finished)
            for request, rollout in zip(requests, recorded, strict=True)
        ]
        values = self._forward(written, vectors, training_step, response_logprobs(self.config.temperature))
        for response, row in zip(written, values.tolist(), strict=True):
            first = len(response.request.prompt_ids) - 1
            response.logprobs = row[first : first + len(response.ids)]
        return self._batch_of([self._rollout(response) for response in written], requests)

    def changed_tokens(self) -> int:
        """How many the interventions changed in the last batch; the trainer changes all that it is told, or stops."""
        return self.changed

    def take_weights(self) -> None:
        """They are here."""

    def close(self) -> None:
        """Nothing runs beside the trainer."""

    def _write(self, responses: Sequence[_Response], vectors: Vectors, training_step: int) -> None:
        """One more token of each."""
        vocab_size = self.side.shape.vocab_size

        def collect(logits_BTV: Tensor, part: Microbatch) -> Tensor:
            last_BV = logits_BTV[torch.arange(len(part.rows)), part.lengths - 1]
            whole_BV = gather_from_tensor_model_parallel_region(last_BV)[:, :vocab_size].float().cpu()
            picked = [self._pick(responses[row], one) for row, one in zip(part.rows.tolist(), whole_BV, strict=True)]
            return torch.tensor(picked, dtype=torch.float32)

        for response, (token, logprob) in zip(
            responses, self._forward(responses, vectors, training_step, collect, 2).tolist(), strict=True
        ):
            response.ids.append(int(token))
            response.logprobs.append(logprob)
            response.finished = int(token) in self.end_ids or self._stopped(response.ids)

    def _pick(self, response: _Response, logits_V: Tensor) -> tuple[int, float]:
        """A token and its log-prob in the full distribution, at temperature 1 where the likeliest is asked for."""
        greedy = response.request.greedy or self.config.temperature == 0
        logprobs_V = torch.log_softmax(tempered(logits_V, 1.0 if greedy else self.config.temperature), dim=-1)
        wanted_V = logprobs_V if greedy else narrowed(logprobs_V, self.config) + response.noise(len(logprobs_V))
        token = int(wanted_V.argmax())
        return token, float(logprobs_V[token])

    def _stopped(self, ids: Sequence[int]) -> bool:
        if not self.config.stop:
            return False
        text = self.side.tokenizer.decode(ids)
        return any(stop in text for stop in self.config.stop)

    def _forward(
        self, responses: Sequence[_Response], vectors: Vectors, training_step: int, collect: Collect,
        width: int | None = None,
    ) -> Tensor:  # fmt: skip
        """`collect` of prompt and response so far, (N, width), by default as many numbers as the longest has tokens."""
        requests = [response.request for response in responses]
        ids = [[*response.request.prompt_ids, *response.ids] for response in responses]
        prompts, lengths = [len(request.prompt_ids) for request in requests], [len(row) for row in ids]
        placed = any(request.position is not None for request in requests)
        steered = bool(self.terms.interventions)
        batch = Batch(
            ids=ids,
            fields={"mask": response_mask(prompts, lengths, max(lengths))},
            positions=[request.positions for request in requests] if placed else None,
            vectors=(lambda rows: vectors([requests[row].row for row in rows])) if placed else None,
            prompt_lengths=prompts if steered else None,
            only=[request.only for request in requests] if steered else None,
            strengths=[request.strengths for request in requests] if steered else None,
            training_step=training_step,
        )
        chunks = self.side.policy.chunks
        return forward_rows(chunks, batch, self.world, self.micro_batch_size, collect, width or max(lengths))

    def _rollout(self, response: _Response) -> Rollout:
        return response.request.answered(
            response.sample, response.ids, response.logprobs, response.finished, self.side.tokenizer, self.end_ids
        )

    def _batch_of(self, rollouts: list[Rollout], requests: Sequence[PromptRequest]) -> RolloutBatch:
        self.changed = sum(
            steered_tokens(self._taken_by(request), [rollout], request.positions)
            for rollout, request in zip(rollouts, requests, strict=True)
        )
        rollouts.sort(key=lambda rollout: (rollout.group, rollout.sample))
        return RolloutBatch(tuple(rollouts), InjectionCount(len(rollouts), len(rollouts)))

    def _taken_by(self, request: PromptRequest) -> list[Intervention]:
        wanted = enumerate(self.terms.interventions)
        return [each for number, each in wanted if request.only is None or number in request.only]


def narrowed(logprobs_V: Tensor, config: RolloutConfig) -> Tensor:
    """Log-probs (V,) with those that `top_k`, and then `top_p` of what is left, take away at minus infinity."""
    order = logprobs_V.argsort(descending=True, stable=True)
    kept = order[: config.top_k or None]
    if config.top_p < 1:
        shares = torch.softmax(logprobs_V[kept], dim=-1)
        # Those before a token have less than top_p together; the first is always kept.
        kept = kept[shares.cumsum(0) - shares < config.top_p]
    out = torch.full_like(logprobs_V, -torch.inf)
    out[kept] = logprobs_V[kept]
    return out
