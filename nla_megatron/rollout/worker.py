"""The worker side of vLLM: the target block calls one custom op on static buffers, filled before every forward.

The block's class is swapped for a subclass after its weights are loaded and before the model could be compiled, so
parameter names stay what they are and loading, reloading and tracing still work. vLLM keeps the residual stream as
the sum of two tensors; the reference norm is that of the sum, and the change goes into one of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nla_megatron.interventions.maths import delta

LOAD_FORMAT = "nla_megatron"


@torch.library.custom_op("nla_megatron::inject", mutates_args=("applied",))
def inject(
    hidden_TD: Tensor, residual_TD: Tensor, slot_T: Tensor, table_SD: Tensor, applied: Tensor, method: str, scale: float
) -> Tensor:
    """`hidden` with the intervention's change at tokens whose slot is not negative; `applied` counts those tokens."""
    out, slot = hidden_TD.clone(), slot_T[: hidden_TD.shape[0]]
    rows = (slot >= 0).nonzero()[:, 0]
    if len(rows):
        out[rows] += delta(method, hidden_TD[rows] + residual_TD[rows], table_SD[slot[rows].long()], scale)
        applied += len(rows)
    return out


@inject.register_fake
def _(
    hidden_TD: Tensor, residual_TD: Tensor, slot_T: Tensor, table_SD: Tensor, applied: Tensor, method: str, scale: float
) -> Tensor:
    return torch.empty_like(hidden_TD)


@dataclass
class InjectionBuffers:
    """What the op reads: outside the module's own buffers, which a weight reload rebuilds.

    `slot_T` (tokens of a batch,) int32, -1 for none; `table_SD` one raw activation per live slot, fp32.
    """

    method: str
    scale: float
    slot_T: Tensor
    table_SD: Tensor
    applied: Tensor


def make_block_inject(block: torch.nn.Module, method: str, scale: float, max_tokens: int, device: torch.device) -> None:
    """Swap one vLLM decoder block's class for a subclass that injects after its forward."""
    base: Any = type(block)
    buffers = InjectionBuffers(
        method=method,
        scale=scale,
        slot_T=torch.full((max_tokens,), -1, dtype=torch.int32, device=device),
        table_SD=torch.zeros(1, 1, device=device),
        applied=torch.zeros((), dtype=torch.int64, device=device),
    )

    class InjectingBlock(base):
        injection = buffers

        def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            hidden_TD, residual_TD = base.forward(self, *args, **kwargs)
            return (
                torch.ops.nla_megatron.inject(
                    hidden_TD,
                    residual_TD,
                    buffers.slot_T,
                    buffers.table_SD,
                    buffers.applied,
                    buffers.method,
                    buffers.scale,
                ),
                residual_TD,
            )

    block.__class__ = InjectingBlock


def register_loader() -> None:
    """Register the loader that swaps the block; vLLM's own default loader does the loading."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    class InjectingLoader(DefaultModelLoader):
        def __init__(self, load_config: Any):
            self.intervention = dict(load_config.model_loader_extra_config)
            super().__init__(dataclasses.replace(load_config, load_format="auto", model_loader_extra_config={}))

        def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
            super().load_weights(model, model_config)
            spec = self.intervention
            decoder: Any = model
            block = decoder.model.layers[spec["layer"]]
            if not hasattr(block, "injection"):
                device = next(model.parameters()).device
                make_block_inject(block, spec["method"], spec["scale"], spec["max_tokens"], device)

    register_model_loader(LOAD_FORMAT)(InjectingLoader)


class InjectingWorker:
    """Marks, before each forward, which tokens of the batch take which slot, and keeps count of the requests.

    Requests carry `extra_args = {"slot", "position"}`; `position` is the marker's absolute index in the prompt, so
    chunked prefills find it in whichever chunk it falls.
    """

    def __init__(self, runner: Any, layer: int):
        self.runner = runner
        self.buffers: InjectionBuffers = runner.model.model.layers[layer].injection
        self.marked_tokens = 0
        self.marked_requests: set[str] = set()
        prepare = runner._prepare_inputs

        def prepare_and_mark(*args: Any, **kwargs: Any) -> Any:
            prepared = prepare(*args, **kwargs)
            self._mark()
            return prepared

        runner._prepare_inputs = prepare_and_mark

    def begin(self, vectors_SD: Tensor) -> None:
        """Start a batch of requests whose slots index `vectors_SD`."""
        self.buffers.table_SD = vectors_SD.float().to(self.buffers.slot_T.device)
        self.buffers.applied.zero_()
        self.marked_tokens = 0
        self.marked_requests = set()

    def finish(self) -> tuple[int, int, int]:
        """(requests marked, tokens marked, tokens that the op changed) since `begin`."""
        self.buffers.slot_T.fill_(-1)
        return len(self.marked_requests), self.marked_tokens, int(self.buffers.applied)

    def _mark(self) -> None:
        buffers, batch = self.buffers, self.runner.input_batch
        buffers.slot_T.fill_(-1)
        starts: Sequence[int] = self.runner.query_start_loc.np
        for index in range(batch.num_reqs):
            request = batch.req_ids[index]
            wanted = self.runner.requests[request].sampling_params.extra_args or {}
            if "slot" not in wanted:
                continue
            first, begin, end = int(batch.num_computed_tokens_cpu[index]), int(starts[index]), int(starts[index + 1])
            if first <= wanted["position"] < first + end - begin:
                buffers.slot_T[begin + wanted["position"] - first] = wanted["slot"]
                self.marked_tokens += 1
                self.marked_requests.add(request)
