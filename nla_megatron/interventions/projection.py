"""`project`: a learned map of the vectors before they meet the stream. Legend: N vectors, E wide before, D after."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nla_megatron.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

Drop = Callable[[Tensor, int], Tensor]
"""(what leaves a layer (N, D), the layer's number) -> the same with some of it set to 0 and the rest scaled."""


class Projection(nn.Module):
    """v' = Wv + b, or (Linear, LayerNorm, ReLU, dropout) `layers` - 1 times and then Linear. Parameters are fp32.

    One square layer starts as the identity. Other matrices start orthogonal, drawn from `seed` and from nothing else,
    so that every rank and every resumed run makes the same ones. Inner layers are D wide.

    Args:
        width_in, width_out: E and D.
        layers: how many linear maps there are.
        seed: of the start; None leaves the linear maps to whoever fills them.

    Raises:
        ConfigError: no layers, or no width.
    """

    def __init__(self, width_in: int, width_out: int, layers: int = 1, seed: int | None = 0):
        super().__init__()
        if min(width_in, width_out, layers) < 1:
            raise ConfigError(
                f"a projection from {width_in} to {width_out} with {layers} layers",
                "positive widths and layers", "correct the intervention",
            )  # fmt: skip
        widths = [width_in] + [width_out] * layers
        # Empty, not torch's own start: that one would advance the global generator.
        linears = [
            nn.utils.skip_init(nn.Linear, before, after, dtype=torch.float32)
            for before, after in zip(widths, widths[1:], strict=False)
        ]
        self.linears = nn.ModuleList(linears)
        self.norms = nn.ModuleList(nn.LayerNorm(width_out, dtype=torch.float32) for _ in range(layers - 1))
        if seed is not None:
            _start(linears, seed)

    def forward(self, vectors_NE: Tensor, drop: Drop | None = None) -> Tensor:
        """(N, E) of any dtype -> (N, D) fp32.

        Args:
            drop: between layers, in `train()` mode only. A sampler sees none, so neither may a trainer whose log-probs
                are compared with the sampler's.
        """
        values = vectors_NE.float()
        for number, (linear, norm) in enumerate(zip(self.linears, self.norms, strict=False)):
            values = norm(linear(values)).relu()
            if drop is not None and self.training:
                values = drop(values, number)
        out: Tensor = self.linears[-1](values)
        return out


def _start(linears: list[nn.Linear], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for linear in linears:
        if len(linears) == 1 and linear.in_features == linear.out_features:
            nn.init.eye_(linear.weight)
        else:
            nn.init.orthogonal_(linear.weight, generator=generator)
        nn.init.zeros_(linear.bias)


def projector(projections: Mapping[int, Projection]) -> Callable[[int, np.ndarray], np.ndarray]:
    """What an engine is given for `project`: an intervention's number and vectors (N, E) fp32 to (N, D) fp32."""

    @torch.no_grad()
    def project(number: int, vectors_NE: np.ndarray) -> np.ndarray:
        projection = projections[number]
        device = next(projection.parameters()).device
        mapped: np.ndarray = projection(torch.from_numpy(vectors_NE).to(device)).cpu().numpy()
        return mapped

    return project
