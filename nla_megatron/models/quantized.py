"""4-bit weights in Megatron's linear layers: NF4 (Dettmers et al., 2023), the format of bitsandbytes.

A quantised layer has no parameter `weight`. It holds its rank's part as codes of 4 bits and one fp32 scale for each
block of 64 inputs of a row, 4.5 bits a weight in all, and its attribute `weight` is made of them each time that it is
read. Forward and backward pass each read it once, so that between the two nothing of it is kept. Blocks do not cross
rows: a rank's part, and a row of a fused layer, has the numbers that the whole projection has. The scales are not
quantised once more, since that takes a mean over the whole tensor, which no layout keeps.

Legend: T tokens, B rows, I inputs and O outputs on this TP rank.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor, nn

from nla_megatron.errors import VersionError

NONE, NF4 = "none", "nf4"
BLOCK = 64
"""Weights that share a scale."""


def check_installed() -> None:
    """Whether there is what quantises, without importing it. Raises VersionError."""
    if find_spec("bitsandbytes") is None:
        raise VersionError(
            "no bitsandbytes", "bitsandbytes, which makes the 4-bit weights",
            "pip install bitsandbytes (constraints.txt has the version that was tested), or leave quantize out",
        )  # fmt: skip


class _Product(torch.autograd.Function):
    """input @ weight.T of a quantised layer, which is asked for its weight again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, input_TBI: Tensor, weight_OI: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(input_TBI, weight_OI)

    @staticmethod
    def backward(ctx: Any, *gradients_TBO: Tensor) -> tuple[Tensor, None, None]:
        return gradients_TBO[0] @ ctx.layer.weight, None, None


class QuantizedLinear:
    """Mixed into a linear layer's class: 4-bit codes in the place of the weight; collectives and bias are the layer's.

    The layer starts at zero; `take` gives it a weight.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, *sizes: int, init_method: Any, **options: Any):
        # A whole weight is there for this moment only, and nobody reads it: it is not drawn.
        super().__init__(*sizes, init_method=_left_as_it_is, **options)  # type: ignore[call-arg]
        layer: Any = self
        # Of a weight that is not there: its shape and dtype.
        self.weight_like = torch.empty_like(layer.weight, device="meta", requires_grad=False)
        rows, inputs = self.weight_like.shape
        assert inputs % BLOCK == 0, f"rows of {inputs} weights"
        del layer.weight
        # A checkpoint has no place for them: they are made anew of the directory that the run starts from.
        for name, shape, dtype in (
            ("codes", (rows * inputs // 2, 1), torch.uint8), ("scales", (rows * inputs // BLOCK,), torch.float32),
        ):  # fmt: skip
            layer.register_buffer(name, torch.zeros(shape, dtype=dtype), persistent=False)

    @torch.no_grad()
    def take(self, weight_OI: Tensor) -> None:
        """Hold this weight, of any dtype: equal files give equal codes, whatever the dtype of training."""
        from bitsandbytes.functional import quantize_4bit

        assert weight_OI.shape == self.weight_like.shape
        here = weight_OI.to(self.codes.device, torch.float32).contiguous()
        codes, state = quantize_4bit(here, blocksize=BLOCK, quant_type=NF4)
        self.codes.copy_(codes)
        self.scales.copy_(state.absmax)

    @property
    @torch.no_grad()
    def weight(self) -> Tensor:
        """(O, I) in the model's dtype, made at each reading."""
        if "scales" not in self.__dict__["_buffers"]:
            # The layer is being built: torch then finds the parameter.
            raise AttributeError("weight")
        from bitsandbytes.functional import QuantState, dequantize_4bit

        like = self.weight_like
        state = QuantState(self.scales, like.shape, blocksize=BLOCK, quant_type=NF4, dtype=like.dtype)
        made: Tensor = dequantize_4bit(self.codes, state)
        return made

    def _forward_impl(
        self, input: Tensor, weight: Tensor, bias: Tensor | None = None, *,
        allreduce_dgrad: bool = False, tp_group: Any = None, **_: Any,
    ) -> Tensor:  # fmt: skip
        """What Megatron's `forward` calls between its collectives."""
        if allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        output: Tensor = _Product.apply(input, weight, self)
        return output if bias is None else output + bias


def _left_as_it_is(weight: Tensor) -> None:
    """An initialisation that leaves a tensor as it is."""


@cache
def in_nf4(linear: type) -> type:
    """The same class of linear layer with 4-bit weights."""
    return type(f"Quantized{linear.__name__}", (QuantizedLinear, linear), {})


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantised layers of a module, by their names in it."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
