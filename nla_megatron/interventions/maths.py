"""The injection modes (Karvonen et al. for `norm_add`; the NLA paper for `replace`), on plain tensors.

Legend: N positions, D hidden. All norms are fp32, whatever the residual stream's dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _unit(vectors_ND: Tensor) -> Tensor:
    vectors = vectors_ND.float()
    return vectors / vectors.norm(dim=-1, keepdim=True)


def norm_add(stream_ND: Tensor, vectors_ND: Tensor, scale: float) -> Tensor:
    """x + scale * |x| * v / |v|: the activation's direction at the stream's own size."""
    stream = stream_ND.float()
    return stream + scale * stream.norm(dim=-1, keepdim=True) * _unit(vectors_ND)


def add(stream_ND: Tensor, vectors_ND: Tensor, scale: float) -> Tensor:
    """x + scale * v."""
    return stream_ND.float() + scale * vectors_ND.float()


def replace(stream_ND: Tensor, vectors_ND: Tensor, scale: float) -> Tensor:
    """scale * v / |v|: nothing of the stream is left."""
    return (scale * _unit(vectors_ND)).expand(stream_ND.shape)


MODES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"norm_add": norm_add, "add": add, "replace": replace}


def intervene(method: str, stream_ND: Tensor, vectors_ND: Tensor, scale: float) -> Tensor:
    """The stream after the intervention, in the stream's dtype.

    Args:
        method: a key of `MODES`.
        stream_ND: the full residual stream at the positions, (N, D).
        vectors_ND: one activation per position, (N, D), raw.
        scale: alpha, or the norm for `replace`.
    """
    return MODES[method](stream_ND, vectors_ND, scale).to(stream_ND.dtype)


def delta(method: str, stream_ND: Tensor, vectors_ND: Tensor, scale: float) -> Tensor:
    """What the intervention adds to the stream, for engines that keep the stream as a sum of two tensors."""
    return (MODES[method](stream_ND, vectors_ND, scale) - stream_ND.float()).to(stream_ND.dtype)


def check_vectors(vectors_ND: Tensor) -> int:
    """Rows that cannot be injected: not finite, or of no direction."""
    norms = vectors_ND.float().norm(dim=-1)
    return int((~torch.isfinite(norms) | (norms == 0)).sum())
