"""Carriers between rooms. Shapes: N rows, B rows of a microbatch, G samples of a group, T tokens, D hidden."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

DATASET_SIDECAR = ".nla_meta.yaml"
"""What a table's path takes on for its sidecar's."""


@dataclass(frozen=True)
class ModelShape:
    """What a decoder looks like, whoever wrote its configuration.

    Example:
        >>> shape.truncated(3).num_layers
        3
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rope_theta: float
    norm_eps: float
    tied_embeddings: bool
    qk_norm: bool
    max_positions: int

    def truncated(self, num_layers: int) -> ModelShape:
        """The same shape with fewer blocks, as the AR has."""
        return replace(self, num_layers=num_layers)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding in Megatron: a multiple of 128 whatever the TP, so that checkpoints fit every TP."""
        return -(-self.vocab_size // 128) * 128


@dataclass(frozen=True)
class Injection:
    """Activations for the marker positions of a microbatch: `vectors` (B, D) fp32, `positions` (B,) int64."""

    vectors: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Microbatch:
    """Right-padded rows of one forward pass.

    `ids` (B, T) int64; `lengths` (B,) int64; `weights` (B,) fp32, 0 for rows that only fill the last microbatch;
    `rows` (B,) int64, the row's index in its batch; `vectors` (B, D) fp32, raw activations: what the AV reads, or the
    AR's target; `positions` (B,) int64, the marker's index, for the AV; `fields` whatever the loss needs, (B, ...).
    """

    ids: Tensor
    lengths: Tensor
    weights: Tensor
    rows: Tensor
    vectors: Tensor | None = None
    positions: Tensor | None = None
    fields: dict[str, Tensor] = field(default_factory=dict)

    @property
    def injection(self) -> Injection | None:
        if self.positions is None or self.vectors is None:
            return None
        return Injection(self.vectors, self.positions)


@dataclass(frozen=True)
class Rollout:
    """One sampled response.

    `group`: index of its prompt within the step, never inferred from equal tokens. `row`: the activation's row in the
    data table. `logprobs`: the sampler's, one per response token. `finished`: the policy wrote its end token.
    """

    group: int
    sample: int
    row: int
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finished: bool


@dataclass(frozen=True)
class InjectionCount:
    """Requests whose marker was injected, against those that should have been."""

    injected: int
    expected: int


@dataclass(frozen=True)
class RolloutBatch:
    """All rollouts of a step, ordered by (group, sample), the same on every rank."""

    rollouts: tuple[Rollout, ...]
    injections: InjectionCount


@dataclass(frozen=True)
class Credit:
    """What an algorithm says of a step's rollouts: one advantage per rollout (N,), fp32."""

    advantages: Tensor
