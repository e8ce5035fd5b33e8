"""A step's rollouts as algorithms see them, from short lists. Legend: N rollouts, T tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nla_megatron.algorithms import Algorithm, make_algorithm
from nla_megatron.config.schema import AlgorithmConfig
from nla_megatron.types import PolicyTokens, Sampled


def mask_of(lengths: Sequence[int], first: int = 1) -> Tensor:
    """(N, T): `lengths[n]` tokens from position `first` on, and one position that belongs to nobody at the end."""
    at = torch.arange(first + max(lengths) + 1)[None]
    ends = first + torch.tensor(lengths)[:, None]
    return ((at >= first) & (at < ends)).float()


def spread(values: Sequence[Sequence[float]], mask_NT: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of each response's tokens where the mask has them."""
    out = torch.zeros_like(mask_NT, dtype=dtype)
    out[mask_NT > 0] = torch.tensor([value for row in values for value in row], dtype=dtype)
    return out


def sampled(
    rewards: Sequence[float], groups: Sequence[int], lengths: Sequence[int] | None = None, **more: Any
) -> Sampled:
    """`more`: tensors, or numbers of each response's tokens."""
    mask = mask_of(lengths or [2] * len(rewards))
    given = {name: value if isinstance(value, Tensor) else spread(value, mask) for name, value in more.items()}
    sampler = given.pop("sampler", torch.zeros_like(mask))
    return Sampled(torch.tensor(rewards), torch.tensor(groups), mask, sampler, **given)


def made(name: str = "grpo", **options: Any) -> Algorithm:
    return make_algorithm(AlgorithmConfig(name=name, **options))


def per_rollout(advantages_NT: Tensor, mask_NT: Tensor) -> list[float]:
    """The one advantage that all tokens of a response have; fails where they differ."""
    first = advantages_NT.gather(1, mask_NT.argmax(1, keepdim=True))
    assert torch.equal(advantages_NT, first * mask_NT)
    return first[:, 0].tolist()


def random_tokens(
    lengths: Sequence[int], seed: int = 0, step: float = 0.3, dtype: torch.dtype = torch.float64, advantages: Any = None
) -> PolicyTokens:
    """Log-probs that moved by about `step` since the step began, from a reference and a sampler as far away."""
    generator, mask = torch.Generator().manual_seed(seed), mask_of(lengths).to(dtype)

    def noise(size: float) -> Tensor:
        return torch.randn(mask.shape, generator=generator, dtype=dtype) * size * mask

    logprobs = -noise(1.0).abs() - mask
    wanted = torch.randn(len(lengths), 1, generator=generator, dtype=dtype)
    if advantages is not None:
        wanted = torch.as_tensor(advantages, dtype=dtype)[:, None]
    return PolicyTokens(
        logprobs=logprobs.requires_grad_(),
        old=(logprobs + noise(step)).detach(),
        sampler=(logprobs + noise(step)).detach(),
        advantages=wanted * mask,
        mask=mask,
        reference=(logprobs + noise(1.0)).detach(),
        entropy=noise(1.0).abs().requires_grad_(),
    )


def total_loss(algorithm: Algorithm, tokens: PolicyTokens) -> Tensor:
    """What the trainer minimises in one optimizer step over these rows."""
    return (algorithm.token_loss(tokens)[0] * algorithm.token_weights(tokens.mask)).sum()
