"""Layers that megatron-core's local ones lack: norms as transformers computes them, norms behind a linear layer."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import RowParallelLinear
from torch import Tensor, nn


class RmsNorm(nn.Module):
    """RMSNorm, fp32 inside; multiplies by 1 + weight where the configuration says so (Gemma).

    A zero-centred norm is rounded to the stream's dtype after the product with the weight, the other before it, as
    the models were trained.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any):
        super().__init__()
        self.eps, self.zero_centered = eps, config.layernorm_zero_centered_gamma
        start = torch.zeros if self.zero_centered else torch.ones
        self.weight = nn.Parameter(start(hidden_size, dtype=config.params_dtype))
        # With sequence parallelism each TP rank sees some of the tokens, and the gradients are summed by this mark.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, stream: Tensor) -> Tensor:
        width = self.weight.shape
        if self.zero_centered:
            return F.rms_norm(stream.float(), width, 1.0 + self.weight.float(), self.eps).to(stream.dtype)
        if stream.dtype == torch.float32:
            return F.rms_norm(stream, width, self.weight, self.eps)
        return self.weight * F.rms_norm(stream.float(), width, None, self.eps).to(stream.dtype)


class NormedRowParallelLinear(RowParallelLinear):
    """A row-parallel linear layer with a norm behind it; the names are those of Megatron-Bridge.

    The norm is a hook, so that whatever a subclass adds to the layer's output goes through it too.
    """

    def __init__(self, input_size: int, output_size: int, *, config: Any, **options: Any):
        super().__init__(input_size, output_size, config=config, **options)
        self.post_layernorm = RmsNorm(config, output_size, config.layernorm_epsilon)
        self.register_forward_hook(_through_its_norm)


def _through_its_norm(
    layer: NormedRowParallelLinear, inputs: Any, output: tuple[Tensor, Tensor | None]
) -> tuple[Tensor, None]:
    stream, bias = output
    return layer.post_layernorm(stream if bias is None else stream + bias), None


@cache
def biased(linear: type) -> type:
    """The same class of linear layer with a bias, whatever the configuration says of all layers."""

    def __init__(self: Any, *sizes: int, **options: Any) -> None:
        linear.__init__(self, *sizes, **{**options, "bias": True})  # type: ignore[misc]

    return type(f"Biased{linear.__name__}", (linear,), {"__init__": __init__})


def gelu_tanh(stream: Tensor) -> Tensor:
    return F.gelu(stream, approximate="tanh")


def scale_output(module: nn.Module, scale: float) -> None:
    """Multiply what a module puts out; the scale is rounded to the output's dtype first, as transformers does."""

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * torch.tensor(scale, dtype=output.dtype, device="cpu").item()

    module.register_forward_hook(hook)


def soft_capped(values: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(values / cap); unchanged without a cap."""
    return values if cap is None else torch.tanh(values / cap) * cap
