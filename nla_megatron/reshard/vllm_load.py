"""Into a running vLLM: straight into parameters that are as loaded, module by module where the engine repacks them.

The load runs inside vLLM's own weight-update session (start, update, finish), as the engine `BACKEND` of its factory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import layerwise, meta, utils

from nla_megatron.reshard.carriers import Need
from nla_megatron.reshard.vllm_side import ORDINARY, Trace

BACKEND = "nla_megatron"
_EMBEDDING, _LINEAR = "UnquantizedEmbeddingMethod", "UnquantizedLinearMethod"


class VllmTargets:
    """The parameters of a live model, as they are before vLLM repacks them.

    Args:
        arrived: told of every parameter that is complete, with its values as loaded.
    """

    def __init__(self, worker: Any, trace: Trace, arrived: Callable[[str, Tensor], None]):
        self.runner, self.model = worker.model_runner, worker.model_runner.get_model()
        self.trace, self.arrived = trace, arrived
        self.wholes: dict[str, Tensor] = {}
        self.unfinished: dict[str, set[str]] = {}
        for name in _buffers(trace.needs):
            if not name.startswith(ORDINARY):
                self.unfinished.setdefault(name.rpartition(".")[0], set()).add(name)
        self.open: set[str] = set()
        self.shapes = {need.piece.buffer: need for need in trace.needs if need.piece.buffer.startswith(ORDINARY)}

    def tensor(self, name: str) -> Tensor:
        if name.startswith(ORDINARY):
            need = self.shapes[name]
            if name not in self.wholes:
                dtype = getattr(torch, need.dtype)
                self.wholes[name] = torch.empty(need.piece.region.shape, dtype=dtype, device=self.runner.device)
            return self.wholes[name]
        module, _, attribute = name.rpartition(".")
        layer = self._layer(module)
        if module not in self.open and not self._as_loaded(layer, module):
            self._open(layer, module)
        return getattr(layer, attribute).data

    def _layer(self, module: str) -> Any:
        """An adapted layer keeps the one that is loaded inside."""
        found = self.model.get_submodule(module)
        return getattr(found, "base_layer", found)

    def _as_loaded(self, layer: Any, module: str) -> bool:
        """Whether the live parameters are what the loaders wrote; vLLM's other layers repack or quantise them."""
        method = type(getattr(layer, "quant_method", None)).__name__
        on_cpu = self.runner.device.type == "cpu"
        if method not in ("NoneType", _EMBEDDING, *(() if on_cpu else (_LINEAR,))):
            return False
        wanted = {name.rpartition(".")[2]: self.trace.parameters[name] for name in self.unfinished[module]}
        live = {name: getattr(layer, name) for name in wanted}
        return all(tuple(live[name].shape) == one.shape and live[name].is_contiguous() for name, one in wanted.items())

    def _open(self, layer: Any, module: str) -> None:
        info = layerwise.get_layerwise_info(layer)
        # A load that did not come to its end has left the module open: what the engine computes with is known already.
        if info.kernel_tensors is None:
            info.kernel_tensors = utils.get_layer_params_buffers(layer)
            info.kernel_non_persistent_buffers = set(layer._non_persistent_buffers_set)
        meta.restore_layer_on_meta(layer, info)
        meta.materialize_layer(layer, info)
        self.open.add(module)
        for name, parameter in layer._parameters.items():
            buffer = self.trace.parameters.get(f"{module}.{name}")
            if parameter is not None and buffer is not None and not buffer.full:
                parameter.data.zero_()

    def finish(self, name: str) -> None:
        """A parameter is complete; with the last one of its module, vLLM makes of it what it computes with."""
        self.arrived(name, self.tensor(name))
        if name.startswith(ORDINARY):
            return
        module = name.rpartition(".")[0]
        self.unfinished[module].discard(name)
        if not self.unfinished[module] and module in self.open:
            layer = self._layer(module)
            layerwise._layerwise_process(layer, layerwise.get_layerwise_info(layer))
            self.open.discard(module)

    def end(self) -> None:
        """What takes the ordinary path, and layers that keep a packed copy beside a parameter."""
        left = sorted(name for names in self.unfinished.values() for name in names)
        assert not left, f"not loaded: {left}"
        if self.wholes:
            weights = ((name, self.wholes.pop(ORDINARY + name)) for name in self.trace.ordinary)
            self.runner.reload_weights(weights_iterator=weights, is_checkpoint_format=True)
        for layer in self.model.modules():
            method: Any = getattr(layer, "quant_method", None)
            if type(method).__name__ == _EMBEDDING:
                method.process_weights_after_loading(layer)


def _buffers(needs: Sequence[Need]) -> list[str]:
    return list(dict.fromkeys(need.piece.buffer for need in needs))


@dataclass
class LoadInfo(WeightTransferInitInfo):
    """`load` does the whole load in this process; every rank calls it at the same time."""

    load: Callable[[], None]


@dataclass
class NoInfo(WeightTransferUpdateInfo):
    """The plan knows everything already."""


class ReshardTransfer(WeightTransferEngine[LoadInfo, NoInfo]):
    """The trainer is in the same processes: an update is a replay of the plan."""

    init_info_cls = LoadInfo
    update_info_cls = NoInfo
    supports_draft_weight_update = False

    def init_transfer_engine(self, init_info: LoadInfo) -> None:
        self.load = init_info.load

    def start_weight_update(self) -> None:
        pass

    def receive_weights(self, update_info: NoInfo) -> None:
        self.load()

    def finish_weight_update(self) -> None:
        pass

    def shutdown(self) -> None:
        self.load = lambda: None


def install(worker: Any, load: Callable[[], None]) -> None:
    """Make `load` what the worker's weight updates do."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, ReshardTransfer)
    worker.weight_transfer_engine = WeightTransferEngineFactory.create_engine(
        WeightTransferConfig(backend=BACKEND), worker.vllm_config, worker.device, worker.model_runner.get_model()
    )
    worker.init_weight_transfer_engine({"load": load})


def update(worker: Any) -> None:
    """One update with vLLM's bookkeeping; raises what the load raises, and then the session is not finished."""
    worker.start_weight_update()
    worker.update_weights({})
    worker.finish_weight_update()
