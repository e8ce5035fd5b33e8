"""The operator that vLLM's blocks call: it changes the residual stream in place, at the tokens that are marked.

To torch.compile it is opaque, and all that a graph holds of it is the site's name: the buffers are looked up in vLLM's
forward context when it runs, as its own attention layers are. It never waits for a device.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("nla_megatron", "FRAGMENT")


def _inject(hidden_TD: Tensor, residual_TD: Tensor | None, site: str) -> None:
    from vllm.forward_context import get_forward_context

    get_forward_context().no_compile_layers[site].change(hidden_TD, residual_TD)


def _traced(hidden_TD: Tensor, residual_TD: Tensor | None, site: str) -> None:
    """Nothing is made, so there is no shape to tell."""


# torch.library.custom_op would check its arguments in Python at each call.
_LIBRARY.define("inject(Tensor(a!) hidden, Tensor? residual, str site) -> ()")
_LIBRARY.impl("inject", _inject, "CompositeExplicitAutograd")
torch.library.register_fake("nla_megatron::inject", _traced, lib=_LIBRARY)
