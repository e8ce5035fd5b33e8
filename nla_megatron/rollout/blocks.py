"""vLLM's decoder blocks, made to call the operator.

A block's class is swapped for a subclass after its weights are loaded and before the model is compiled, so parameter
names stay and loading, reloading and tracing work as before.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nla_megatron.errors import UnsupportedModel
from nla_megatron.interventions.spec import EMBEDDING, Intervention


def site_name(number: int) -> str:
    """How an intervention's site is known in vLLM's forward context, and in compiled graphs."""
    return f"nla_megatron.{number}"


def decoder_blocks(model: Any) -> Sequence[nn.Module]:
    """The decoder's blocks, in order.

    Raises:
        UnsupportedModel: the model keeps them in no `model.layers`.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    if layers is None:
        raise UnsupportedModel(
            f"{type(model).__name__} of vLLM has no model.layers",
            "a decoder as vLLM's Qwen, Llama, Mistral and Gemma have it",
            "inject into a model of another family",
        )
    return layers


def call_sites(model: nn.Module, interventions: Sequence[Intervention]) -> None:
    """Make the blocks of a loaded model call the sites of `interventions`, which are numbered in this order."""
    blocks = decoder_blocks(model)
    before: dict[int, list[str]] = {}
    after: dict[int, list[str]] = {}
    for number, intervention in enumerate(interventions):
        if intervention.layer == EMBEDDING:
            before.setdefault(0, []).append(site_name(number))
        else:
            after.setdefault(int(intervention.layer), []).append(site_name(number))
    for index in before.keys() | after.keys():
        block = blocks[index]
        block.__class__ = _intervened(type(block), before.get(index, ()), after.get(index, ()))


def _intervened(base: Any, before: Sequence[str], after: Sequence[str]) -> Any:
    names = list(inspect.signature(base.forward).parameters)[1:]
    place = names.index("hidden_states")

    class Intervened(base):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            for site in before:
                _call(_argument(args, kwargs, place), None, site)
            output = base.forward(self, *args, **kwargs)
            for site in after:
                if isinstance(output, tuple):
                    _call(output[0], output[1], site)
                else:
                    _call(output, None, site)
            return output

    Intervened.__name__ = f"Intervened{base.__name__}"
    return Intervened


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int) -> Tensor:
    return args[place] if len(args) > place else kwargs["hidden_states"]


def _call(hidden_TD: Tensor, residual_TD: Tensor | None, site: str) -> None:
    torch.ops.nla_megatron.inject(hidden_TD, residual_TD, site)
