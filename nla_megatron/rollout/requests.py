"""What the engine is asked for, checked before anything is generated, and dealt to the replicas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from nla_megatron.contract.tokenizer import ModelTokenizer, wrapped
from nla_megatron.errors import ColumnError, ConfigError, InjectionError, LayoutError
from nla_megatron.interventions.checks import Marker, check_brought, check_positions, check_vectors
from nla_megatron.interventions.placement import filled, taken
from nla_megatron.interventions.spec import Intervention
from nla_megatron.models.batching import check_ids
from nla_megatron.rollout.accounting import Asked, salt_of
from nla_megatron.types import Rollout

if TYPE_CHECKING:
    from nla_megatron.config.schema import InterventionConfig
    from nla_megatron.contract.tokenizer import AnyTokenizer

Vectors = Callable[[Sequence[int]], np.ndarray]
"""Rows of the data table -> activations (N, D) fp32, or (N, K, D) where a row brings several, its own the last and NaN
in front where it brings fewer; asked only for this replica's share."""

Project = Callable[[int, np.ndarray], np.ndarray]
"""For the mode `project`: an intervention's number and vectors (N, E) to (N, D), as the trainer has it at that moment;
`interventions.projection.projector` makes one."""

Prompt = str | Sequence[int] | Sequence[dict[str, str]]
"""Plain text, token ids, or the messages of a chat."""


@dataclass(frozen=True)
class PromptRequest:
    """One prompt to sample: `position` is the marker's index in `prompt_ids`, `row` the activation's.

    A `position` of None is for requests that take no intervention at positions: the engine has none, or `only` leaves
    them out.

    `more_positions`: further places of the same vector, or of the others where a row brings several. `only`: numbers of
    the engine's interventions that this request takes; None is all, () leaves it as the model is. `strengths`: for each
    intervention of the engine one number, or F for steered features; None is 1. `samples`: in place of the call's.
    `greedy`: the likeliest tokens, one response; its log-probs are those at temperature 1.
    """

    group: int
    row: int
    prompt_ids: tuple[int, ...]
    position: int | None
    seed: int
    more_positions: tuple[int, ...] = ()
    only: tuple[int, ...] | None = None
    strengths: tuple[tuple[float, ...] | None, ...] | None = None
    samples: int | None = None
    greedy: bool = False

    @property
    def name(self) -> str:
        return f"group {self.group} (row {self.row})"

    @property
    def positions(self) -> tuple[int, ...]:
        """All of them; none where it takes no intervention at positions."""
        return () if self.position is None else (self.position, *self.more_positions)

    def answered(
        self, sample: int, ids: Sequence[int], logprobs: Sequence[float], finished: bool, tokenizer: ModelTokenizer,
        end_ids: Sequence[int],
    ) -> Rollout:  # fmt: skip
        """A response to it; the token of `end_ids` that ended it is part of its ids, and not of its text."""
        ended = bool(ids) and ids[-1] in end_ids
        return Rollout(
            group=self.group,
            sample=sample,
            row=self.row,
            prompt_ids=self.prompt_ids,
            response_ids=tuple(ids),
            logprobs=tuple(logprobs),
            text=tokenizer.decode(ids[:-1] if ended else ids),
            finished=finished,
        )

    def again(self, rollout: Rollout) -> PromptRequest:
        """The same asked for once more of a recorded rollout, which is scored and not sampled."""
        return replace(
            self, group=rollout.group, row=rollout.row, prompt_ids=rollout.prompt_ids, samples=None, greedy=False
        )


def as_interventions(wanted: InterventionConfig | Intervention | Sequence[Intervention]) -> tuple[Intervention, ...]:
    """What an engine is started with, as a list: those of the configuration's blocks, or any number."""
    if isinstance(wanted, Intervention):
        return (wanted,)
    if isinstance(wanted, Sequence):
        return tuple(wanted)
    then, layers = wanted.projection.then, wanted.projection.layers
    return tuple(
        Intervention.recorded(wanted.method, block, wanted.scale, then=then, layers=layers) for block in wanted.blocks
    )


@dataclass(frozen=True)
class Terms:
    """What every request of an engine is held to."""

    interventions: tuple[Intervention, ...]
    hidden_size: int
    max_model_len: int
    marker: Marker | None = None
    vocab_size: int | None = None

    def check(self, requests: Sequence[PromptRequest], samples: int, new_tokens: Sequence[int]) -> None:
        """Everything that is known without the vectors; `new_tokens` of each request.

        Raises:
            InjectionError: a position outside the prompt, or without the marker and its neighbours.
            LayoutError: a prompt that leaves no room for `new_tokens`.
            ColumnError: tokens that the model has no row for.
            ConfigError: no samples, several greedy ones, or strengths that are not numbers.
        """
        for request, new in zip(requests, new_tokens, strict=True):
            count = request.samples or samples
            if count < 1 or (request.greedy and count > 1):
                raise ConfigError(
                    f"{count} samples of {request.name}{', greedy' if request.greedy else ''}",
                    "1 or more, and exactly 1 where it is greedy", "change samples",
                )  # fmt: skip
            if len(request.prompt_ids) + new > self.max_model_len or not request.prompt_ids:
                raise LayoutError(
                    f"a prompt of {len(request.prompt_ids)} tokens and {new} new ones in {request.name}",
                    f"1 or more, and at most {self.max_model_len} in all",
                    "lower rollout.max_new_tokens or raise rollout.max_model_len",
                )  # fmt: skip
            if self.vocab_size is not None:
                check_ids(max(request.prompt_ids), self.vocab_size)
            for intervention, strengths in zip(self.interventions, self._strengths(request, 0), strict=True):
                if strengths is not None:
                    positions = _positions(request, intervention)
                    check_positions(intervention, request.prompt_ids, positions, self.marker, request.name)

    def asked(
        self,
        requests: Sequence[PromptRequest],
        samples: int,
        vectors: Vectors,
        project: Project | None,
        training_step: int,
    ) -> dict[str, Asked]:
        """The requests as the worker knows them, by key.

        Raises:
            WidthError, ColumnError: vectors of another width, not finite, or of no direction.
            InjectionError: a request that brings more or fewer vectors than it names positions.
        """
        by_site = self._vectors(requests, vectors, project)
        asked = {}
        for index, request in enumerate(requests):
            strengths, positions = self._strengths(request, training_step), self._all_positions(request)
            own = tuple(
                None if vectors_ND is None or taken is None else vectors_ND[index]
                for vectors_ND, taken in zip(by_site, strengths, strict=True)
            )
            prompt = len(request.prompt_ids)
            salt = salt_of(self.interventions, own, strengths, positions, prompt)
            asked[str(index)] = Asked(request.name, prompt, positions, own, strengths, salt, request.samples or samples)
        return asked

    def _vectors(
        self, requests: Sequence[PromptRequest], vectors: Vectors, project: Project | None
    ) -> list[np.ndarray | None]:
        """For each intervention what its requests bring, (N, D) or (N, K, D), or None where it takes no vectors."""
        if not requests or not any(each.takes_vectors for each in self.interventions):
            return [None] * len(self.interventions)
        raw = np.ascontiguousarray(vectors([request.row for request in requests]), dtype=np.float32)
        names = [request.name for request in requests]
        if raw.ndim == 3:
            raw = self._filled(requests, raw)
        brought: list[np.ndarray | None] = []
        for number, intervention in enumerate(self.interventions):
            if not intervention.takes_vectors:
                brought.append(None)
                continue
            try:
                check_vectors(intervention, raw, self.hidden_size, names)
            except InjectionError as error:
                raise ColumnError(error.found, error.expected, "extract the table again") from error
            own = np.ascontiguousarray(taken(raw, intervention.vectors))
            if intervention.mode == "project":
                assert project is not None, "checked when the engine starts"
                projected_ND = project(number, own.reshape(-1, own.shape[-1]))
                own = np.ascontiguousarray(projected_ND, dtype=np.float32).reshape(*own.shape[:-1], -1)
            brought.append(own)
        return brought

    def _filled(self, requests: Sequence[PromptRequest], raw_NKD: np.ndarray) -> np.ndarray:
        """The same with something in the place of what rows lack, which each of them has a position less for."""
        whole_NKD, counts = filled(raw_NKD, [len(request.positions) for request in requests])
        for request, count in zip(requests, counts.tolist(), strict=True):
            for number, intervention in enumerate(self.interventions):
                if request.only is None or number in request.only:
                    check_brought(intervention, len(request.positions), count, request.name)
        return whole_NKD

    def _strengths(self, request: PromptRequest, training_step: int) -> tuple[tuple[float, ...] | None, ...]:
        """For each intervention, None where the request does not take it."""
        count = len(self.interventions)
        own, only = request.strengths or (None,) * count, request.only
        if len(own) != count or not set(only or ()) <= set(range(count)):
            raise ConfigError(
                f"strengths for {len(own)} interventions and only={only} in {request.name}",
                f"{count} interventions, numbered from 0", "correct the request",
            )  # fmt: skip
        return tuple(
            each.strengths(own[number], training_step) if only is None or number in only else None
            for number, each in enumerate(self.interventions)
        )

    def _all_positions(self, request: PromptRequest) -> tuple[int, ...]:
        return max((_positions(request, each) for each in self.interventions), key=len, default=())


def _positions(request: PromptRequest, intervention: Intervention) -> tuple[int, ...]:
    return request.positions if intervention.where == "positions" else ()


def shares(weights: Sequence[int], replicas: int) -> list[list[int]]:
    """Indices for each replica, in order: the heaviest first, each to the replica that has least so far.

    Example:
        >>> shares([5, 1, 1, 1, 2], 2)
        [[0], [1, 2, 3, 4]]
    """
    loads, dealt = [0] * replicas, [[] for _ in range(replicas)]  # type: tuple[list[int], list[list[int]]]
    for index in sorted(range(len(weights)), key=lambda each: (-weights[each], each)):
        least = loads.index(min(loads))
        loads[least] += weights[index]
        dealt[least].append(index)
    return [sorted(each) for each in dealt]


def encode(tokenizer: AnyTokenizer, prompt: Prompt) -> tuple[int, ...]:
    """Token ids of a prompt; a text that writes the first token out, as chat templates do, gets no second one."""
    tokenizer = wrapped(tokenizer)
    if isinstance(prompt, str):
        return tuple(tokenizer.beginning(prompt, special=True).ids)
    if prompt and isinstance(prompt[0], dict):
        turns: Any = prompt
        return tuple(tokenizer.beginning(tokenizer.render(turns).text, special=False).ids)
    return tuple(int(each) for each in prompt)  # type: ignore[arg-type]
