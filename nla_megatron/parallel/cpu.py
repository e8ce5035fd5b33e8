"""Stand-ins for the CUDA calls that megatron-core makes unconditionally, for machines without CUDA.

Only names that nobody else calls there are replaced for good, once. The `device="cuda"` arguments are redirected
inside `megatron_device()`, around Megatron's own calls: replacing `torch.empty` and the like globally leaves
transformers' rotary frequencies uninitialised, silently.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_installed = False


class _CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs and "device" in kwargs and str(kwargs["device"]).startswith("cuda"):
            kwargs = {**kwargs, "device": _CPU}
        return func(*args, **(kwargs or {}))


def megatron_device() -> AbstractContextManager:
    """Inside, tensors that Megatron asks for on "cuda" are made on the CPU where there is no CUDA."""
    return nullcontext() if torch.cuda.is_available() else _CudaMeansCpu()


def install_cpu_standins() -> None:
    """Replace, once, what Megatron calls on `torch.cuda` without asking; nothing where CUDA is there."""
    global _installed
    if torch.cuda.is_available() or _installed:
        return
    _installed = True
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.device_count = lambda: 1
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.set_device = lambda *args, **kwargs: None
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self
    type_of = torch.Tensor.type

    def cuda_type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Megatron's optimizer and gradient clipping compare this name with torch.cuda.FloatTensor and the like.
        name = type_of(self, *args, **kwargs)
        if not args and not kwargs and not name.startswith("torch.cuda"):
            name = name.replace("torch.", "torch.cuda.", 1)
        return name

    tensor.type = cuda_type_name


def leave_cuda_rng_alone(tp_random: Any) -> None:
    """Recomputation sets CUDA's generator again; without CUDA, torch would queue that for a start that never comes."""
    if not torch.cuda.is_available():
        tp_random._set_cuda_rng_state = lambda *args, **kwargs: None
