"""Carriers between rooms. Shapes: N rows, B rows of a microbatch, G samples of a group, T tokens, D hidden."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

DATASET_SIDECAR = ".nla_meta.yaml"
"""What a table's path takes on for its sidecar's."""
VECTOR_MODES = ("norm_add", "replace", "add")
"""What a vector does to the residual stream; see `interventions.spec`."""
POOLINGS = ("last", "mean", "max", "cls", "weighted")
"""How an AR makes one vector of its stream; see `models.heads`."""


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained length; names as in Hugging Face's `rope_parameters`.

    `kind` is "linear" (`factor`), "llama3" (`factor`, `low_freq_factor`, `high_freq_factor`, `original_max_positions`)
    or "yarn" (`factor`, `beta_fast`, `beta_slow`, `original_max_positions`, `attention_factor`, `truncate`).
    """

    kind: str
    factor: float
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class Experts:
    """The sparse feed-forward of a mixture-of-experts decoder: `count` experts, `top_k` of them for each token.

    `renormalized`: the chosen experts' probabilities are scaled to sum to one.
    """

    count: int
    top_k: int
    ffn_hidden_size: int
    renormalized: bool = True


@dataclass(frozen=True)
class ModelShape:
    """What a decoder looks like, whoever wrote its configuration.

    Args:
        activation: of the gated feed-forward: "silu" or "gelu_tanh".
        qkv_bias, output_bias, mlp_bias: of the query, key and value projections, of attention's output projection, and
            of the feed-forward.
        windows: per block, how many tokens back attention reaches (the token itself counted), None for all; empty
            where no block has a window.
        local_rope_theta: the rotary base of blocks with a window, where it differs.
        query_scale: attention scores are multiplied by it; None is head_dim ** -0.5.
        attention_softcap, logit_softcap: c in c * tanh(x / c) on scores and logits; None where there is none.
        zero_centered_norms: a norm multiplies by 1 + weight.
        sandwich_norms: attention and feed-forward have a norm behind them too.
        embedding_scale: token embeddings are multiplied by it.
        sinks: each head has a learned score that takes probability and gives nothing.

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
    activation: str = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None
    windows: tuple[int | None, ...] = ()
    query_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    zero_centered_norms: bool = False
    sandwich_norms: bool = False
    embedding_scale: float = 1.0
    sinks: bool = False
    experts: Experts | None = None

    def truncated(self, num_layers: int) -> ModelShape:
        """The same shape with fewer blocks, as the AR has."""
        return replace(self, num_layers=num_layers, windows=self.windows[:num_layers])

    def window_of(self, block: int) -> int | None:
        """How many tokens back block `block` (0-based) attends, the token itself counted; None for all."""
        return self.windows[block] if self.windows else None

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding in Megatron: a multiple of 128 whatever the TP, so that checkpoints fit every TP."""
        return -(-self.vocab_size // 128) * 128


Strengths = tuple[tuple[float, ...] | None, ...]
"""For each intervention of a model one number, or one per steered feature; None is 1."""


@dataclass(frozen=True)
class Steering:
    """Strengths as a tensor, through which a loss reaches whoever chose them.

    `values` (N, S) fp32 on the model's device: for each row of a batch the strengths of all interventions side by side,
    where they are plain numbers in `Strengths`. `columns`: for each intervention its first column and the one after its
    last, None where its strengths stay plain numbers.
    """

    values: Tensor
    columns: tuple[tuple[int, int] | None, ...]


@dataclass(frozen=True)
class Injection:
    """What a model's interventions need to know of the rows of a microbatch.

    `vectors` (B, E) fp32, raw, one per row, or (B, K, E) of several, the own one last; the rest is the host's.
    `lengths` and `prompt_lengths` in tokens; `positions` of each row, absolute indices in its prompt; `only`: the
    numbers of the interventions that a row takes, None for all; `strengths` of each row, None for 1; `training_step`
    for schedules over training. `steering`: of the whole batch, whose rows `rows` these are; it goes before
    `strengths`. `brought`: of rows that bring several vectors how many; a row that brings fewer than K has them last,
    and its own in the place of the others, which no position names.
    """

    vectors: Tensor | None
    lengths: tuple[int, ...]
    prompt_lengths: tuple[int, ...] | None = None
    positions: tuple[tuple[int, ...], ...] | None = None
    only: tuple[tuple[int, ...] | None, ...] | None = None
    strengths: tuple[Strengths | None, ...] | None = None
    training_step: int = 0
    steering: Steering | None = None
    rows: tuple[int, ...] = ()
    brought: tuple[int, ...] | None = None

    def strengths_of(self, row: int, number: int) -> tuple[float, ...] | None:
        """Of one row for one intervention."""
        own = None if self.strengths is None else self.strengths[row]
        return None if own is None else own[number]


@dataclass(frozen=True)
class Microbatch:
    """Right-padded rows of one forward pass.

    `ids` (B, T) int64; `lengths` (B,) int64; `weights` (B,) fp32, 0 for rows that only fill the last microbatch; `rows`
    (B,) int64, the row's index in its batch; `vectors` (B, D) fp32, raw activations: what the AV reads, (B, K, D) where
    rows bring several, or the AR's target; `injection` for the AV, None where its interventions leave the rows alone;
    `fields` whatever the loss needs, (B, ...); `training_step`: the trainer's, 0-based.
    """

    ids: Tensor
    lengths: Tensor
    weights: Tensor
    rows: Tensor
    vectors: Tensor | None = None
    injection: Injection | None = None
    fields: dict[str, Tensor] = field(default_factory=dict)
    training_step: int = 0


@dataclass(frozen=True)
class Rollout:
    """One sampled response.

    `group`: index of its prompt within the step, never inferred from equal tokens. `row`: the activation's row in the
    data table. `logprobs`: the sampler's, one per response token. `finished`: the policy wrote its end token, or a stop
    text.
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

    @property
    def rows(self) -> list[int]:
        """The data row of each rollout."""
        return [rollout.row for rollout in self.rollouts]

    @property
    def groups(self) -> Tensor:
        """(N,) int64: the prompt of each rollout within the step."""
        return _groups(self.rollouts)


def _groups(rollouts: tuple[Rollout, ...]) -> Tensor:
    import torch

    return torch.tensor([rollout.group for rollout in rollouts])


@dataclass(frozen=True)
class Measured:
    """What a task says of rollouts, in their order.

    Args:
        texts: each one's answer in the form that was asked for; None where there is none.
        values: numbers per rollout (N,) fp32 by name, as the task calls them ("mse", "correct", "thinking_tokens").
        references: what each is compared with, where the task has such a thing.
        counts: numbers of the task's rows for the logs, such as references that could not be read.
    """

    rollouts: tuple[Rollout, ...]
    texts: tuple[str | None, ...]
    values: Mapping[str, Tensor] = field(default_factory=dict)
    references: tuple[str | None, ...] = ()
    counts: Mapping[str, float] = field(default_factory=dict)

    @property
    def failed(self) -> Tensor:
        """(N,) bool: no answer in the form that was asked for."""
        import torch

        return torch.tensor([text is None for text in self.texts])

    @property
    def groups(self) -> Tensor:
        """(N,) int64: the prompt of each within the step."""
        return _groups(self.rollouts)


@dataclass(frozen=True)
class Scores:
    """Rewards (N,) fp32, and the terms that they are made of, each (N,), for the logs."""

    rewards: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Needs:
    """What an algorithm wants computed before it credits a step.

    `old`: log-probs of the policy before its first update, which minibatches, epochs and corrections compare with.
    `reference`: those of the reference policy. `values`: a value per token, of a critic that learns. `greedy`: the
    reward of each prompt's greedy response. `entropy`: the entropy of each token's distribution with its gradient.
    """

    old: bool = False
    reference: bool = False
    values: bool = False
    greedy: bool = False
    entropy: bool = False


@dataclass(frozen=True)
class Sampled:
    """A step's rollouts as algorithms see them; tensors of tokens are (N, T) fp32 and 0 outside `mask`.

    `rewards` (N,); `groups` (N,) int64, explicit ids from 0; `mask` 1 at positions that predict a response token;
    `sampler` its log-probs as it sampled; the others where `Needs` asks for them; `greedy` (N,) of each one's prompt.
    """

    rewards: Tensor
    groups: Tensor
    mask: Tensor
    sampler: Tensor
    old: Tensor | None = None
    reference: Tensor | None = None
    values: Tensor | None = None
    greedy: Tensor | None = None


@dataclass(frozen=True)
class Credit:
    """What an algorithm says of a step: advantages per token (N, T) fp32, and returns for a critic.

    `statistics`: numbers of the whole step for the logs.
    """

    advantages: Tensor
    returns: Tensor | None = None
    statistics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PolicyTokens:
    """Tokens of a microbatch under the policy that learns; all (B, T), `mask` says which count.

    `logprobs` (and `entropy`, where asked for) have gradients. `old` is the policy before the first update of the step,
    `sampler` what the sampler said of its own tokens.
    """

    logprobs: Tensor
    old: Tensor
    sampler: Tensor
    advantages: Tensor
    mask: Tensor
    reference: Tensor | None = None
    entropy: Tensor | None = None
