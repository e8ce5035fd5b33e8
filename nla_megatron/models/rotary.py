"""Rotary position embeddings: frequencies as pure functions, tables made once for all blocks.

Legend: T tokens, B rows, H heads, W head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nla_megatron.types import ModelShape, RopeScaling


def rope_frequencies(shape: ModelShape, *, local: bool = False) -> tuple[Tensor, float]:
    """Inverse frequencies (W/2,) fp32 and the factor on cosines and sines.

    Args:
        local: of the blocks with a window, which may have a base of their own, without scaling.
    """
    own_base = shape.local_rope_theta if local else None
    base = shape.rope_theta if own_base is None else own_base
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.int64, device="cpu").float() / shape.head_dim
    frequencies = 1.0 / base**exponents
    scaling = shape.rope_scaling if own_base is None else None
    if scaling is None:
        return frequencies, 1.0
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling), 1.0
    assert scaling.kind == "yarn", scaling.kind
    return _yarn(frequencies, scaling, base, shape.head_dim)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Slow frequencies divided by the factor, fast ones kept, those between blended by their wavelength."""
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * kept + frequencies / scaling.factor * (1 - kept)


def _yarn(frequencies: Tensor, scaling: RopeScaling, base: float, width: int) -> tuple[Tensor, float]:
    """NTK by parts (Peng et al., 2023): dimensions that turn often are kept, those that turn rarely interpolated."""

    def dimension(turns: float) -> float:
        return width * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    span = last - first if last != first else 0.001
    divided = ((torch.arange(width // 2, device="cpu").float() - first) / span).clamp(0, 1)
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return frequencies / scaling.factor * divided + frequencies * (1 - divided), factor


class RotaryTables:
    """Cosines and sines of the last length asked for; the blocks of a model share one."""

    def __init__(self, shape: ModelShape, *, local: bool = False):
        self.frequencies, self.factor = rope_frequencies(shape, local=local)
        self._made_for: tuple[int, torch.device, torch.dtype] | None = None
        self._tables: tuple[Tensor, Tensor]

    def __call__(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(T, 1, 1, W) twice, on the device and in the dtype of `like`."""
        wanted = (length, like.device, like.dtype)
        if wanted != self._made_for:
            # Tables made in inference mode could not be used by a later training step.
            with torch.inference_mode(False), torch.no_grad():
                positions = torch.arange(length, device=like.device).float()
                angles = torch.outer(positions, self.frequencies.to(like.device)).repeat(1, 2)[:, None, None]
                self._tables = (
                    (angles.cos() * self.factor).to(like.dtype), (angles.sin() * self.factor).to(like.dtype)
                )  # fmt: skip
            self._made_for = wanted
        return self._tables


def rotated(heads_TBHW: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each head turned by its position's angles; the two halves of a head are the coordinates of its planes."""
    first, second = heads_TBHW.chunk(2, dim=-1)
    return heads_TBHW * cos + torch.cat((-second, first), dim=-1) * sin
