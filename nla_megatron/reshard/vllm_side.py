"""What every rank of the sampler needs, and where: recorded from vLLM's own `load_weights` on a model without memory.

Each copy of a loader goes from a view of an HF tensor into a view of a parameter; storage, offset, shape and strides of
both tell the regions. What is not such a copy (a transform, a quantised layer) is noticed, and all tensors of that
module take the ordinary path: they are needed whole, and vLLM loads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nla_megatron.errors import ModelsDiffer
from nla_megatron.reshard.carriers import Need
from nla_megatron.reshard.regions import Piece, Region, contiguous, whole

ORDINARY = "ordinary:"
"""What precedes an HF name as the buffer of a whole tensor that vLLM loads itself."""


class Buffer(NamedTuple):
    """A parameter before vLLM repacks it. `full`: copies write every element; the rest is zero."""

    shape: tuple[int, ...]
    dtype: str
    full: bool


@dataclass(frozen=True)
class Trace:
    """One tensor-parallel rank's needs in the order of loading, its parameters, and what takes the ordinary path."""

    needs: tuple[Need, ...]
    parameters: dict[str, Buffer]
    ordinary: tuple[str, ...]


class Copied(NamedTuple):
    name: str
    parameter: str
    source: Tensor
    target: Tensor


class _Recorder(TorchDispatchMode):
    """Copies from sources into parameters; parameters that anything else writes are `changed`.

    `ends`: behind the last element of a parameter that a copy has written.
    """

    def __init__(self, parameters: Mapping[str, Tensor]):
        super().__init__()
        self.parameters = {storage_of(tensor): name for name, tensor in parameters.items()}
        self.sources: dict[int, str] = {}
        self.current, self.copies = "", list[Copied]()
        self.changed: dict[str, set[str]] = {}
        self.ends: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _written_by(func, args, kwargs) if func._schema.is_mutable else ():
            parameter = self.parameters.get(storage_of(tensor))
            if parameter is None:
                # A source that was written to is no HF tensor any more.
                self.sources.pop(storage_of(tensor), None)
            elif not self._understood(func, args, parameter):
                self.changed.setdefault(parameter, set()).add(self.current)
        return func(*args, **kwargs)

    def _understood(self, func: Any, args: Any, parameter: str) -> bool:
        if func in (torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default):
            behind = args[0].storage_offset() >= self.ends.get(parameter, 0)
            return (len(args) == 1 or args[1] == 0) and (behind or not args[0].numel())
        if func is not torch.ops.aten.copy_.default:
            return False
        source = self.sources.get(storage_of(args[1]))
        if source is None or args[0].shape != args[1].shape:
            return False
        self.copies.append(Copied(source, parameter, args[1], args[0]))
        steps = zip(args[0].shape, args[0].stride(), strict=True)
        end = 1 + args[0].storage_offset() + sum((count - 1) * step for count, step in steps)
        self.ends[parameter] = max(end, self.ends.get(parameter, 0))
        return True


def _written_by(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            yield from (
                one for one in (value if isinstance(value, list | tuple) else [value]) if isinstance(one, Tensor)
            )


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def trace(
    vllm_config: Any, tensors: Mapping[str, tuple[int, ...]], tp_rank: int, tp: int, expert_parallel: bool
) -> Trace:
    """Where `load_weights` puts HF tensors of these shapes on one rank. Needs no weights and no process group.

    Raises:
        ModelsDiffer: vLLM's model has no place for a tensor, or another shape.
    """
    with _as_rank(tp_rank, tp, expert_parallel, vllm_config):
        model = skeleton(vllm_config, torch.device("meta"))
        parameters = dict(model.named_parameters())
        dtype = vllm_config.model_config.dtype
        sources = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in tensors.items()}
        recorder = _Recorder(parameters)
        recorder.sources = {storage_of(tensor): name for name, tensor in sources.items()}

        def told() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in sources.items():
                recorder.current = name
                yield name, tensor

        try:
            with recorder:
                model.load_weights(told())
        except (AssertionError, KeyError, ValueError, RuntimeError) as error:
            raise ModelsDiffer(
                f"vLLM cannot load {recorder.current} of shape {tensors[recorder.current]}: {error or 'another shape'}",
                "the model that the trainer trains", "give the engine the directory that the trainer started from",
            ) from error  # fmt: skip
        _check_replaced(recorder, model)
        return _as_trace(recorder, parameters, tensors, str(dtype).removeprefix("torch."))


def check_taken(traces: Sequence[Trace], tensors: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ModelsDiffer where no rank needs a tensor: vLLM's loaders pass over what they have no place for."""
    taken = {need.piece.region.name for found in traces for need in found.needs}
    if left := [name for name in tensors if name not in taken]:
        raise ModelsDiffer(
            f"{len(left)} tensors that vLLM's model does not load, first {left[0]}", "all of the trainer's",
            "train a model without them: the sampler's would be another policy",
        )  # fmt: skip


def skeleton(vllm_config: Any, device: torch.device) -> Any:
    """vLLM's model with empty parameters on `device`; the configuration stays as it was."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers import rotary_embedding
    from vllm.model_executor.model_loader.utils import initialize_model

    # Rotary tables are kept for all models of the process; those without memory must not be found by an engine.
    tables = dict(rotary_embedding._ROPE_DICT)
    compilation = vllm_config.compilation_config
    contexts = {name: value.copy() for name, value in vars(compilation).items() if name.startswith("static_")}
    try:
        before = torch.get_default_dtype()
        torch.set_default_dtype(vllm_config.model_config.dtype)
        with set_current_vllm_config(vllm_config), device, _MapsInMemory():
            model = initialize_model(vllm_config=vllm_config, prefix="trace")
    finally:
        torch.set_default_dtype(before)
        vars(compilation).update(contexts)
        rotary_embedding._ROPE_DICT.clear()
        rotary_embedding._ROPE_DICT.update(tables)
    return model


class _MapsInMemory(TorchFunctionMode):
    """The loaders of experts read maps of numbers, which therefore have values whatever the device of the weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("dtype") is torch.int32 and func in (torch.full, torch.arange, torch.ones, torch.tensor):
            kwargs = {"device": "cpu", **kwargs}
        return func(*args, **kwargs)


@contextmanager
def _as_rank(tp_rank: int, tp: int, expert_parallel: bool, vllm_config: Any) -> Iterator[None]:
    """Inside, vLLM takes itself for one rank of a tensor-parallel group that nobody has made."""
    from vllm.distributed import parallel_state

    names = [name for name in vars(parallel_state) if name.startswith("_") and name[1:].isupper()]
    wanted = {"_TP": (tp_rank, tp), "_EP": (tp_rank, tp), "_PP": (0, 1), "_DP": (0, 1), "_PCP": (0, 1), "_DCP": (0, 1)}
    before = {name: getattr(parallel_state, name) for name in names if name in wanted}
    parallel = vllm_config.parallel_config
    sizes = {"tensor_parallel_size": tp, "enable_expert_parallel": expert_parallel}
    configured = {name: getattr(parallel, name) for name in sizes}
    try:
        for name, (rank, size) in wanted.items():
            setattr(parallel_state, name, _group(rank, size))
        vars(parallel).update(sizes)
        yield
    finally:
        vars(parallel_state).update(before)
        vars(parallel).update(configured)


def _group(rank: int, size: int) -> Any:
    handle = SimpleNamespace(size=lambda: size, rank=lambda: rank)
    return SimpleNamespace(
        rank_in_group=rank, world_size=size, rank=rank, local_rank=rank, ranks=list(range(size)),
        is_first_rank=rank == 0, is_last_rank=rank == size - 1, device_group=handle, cpu_group=handle,
    )  # fmt: skip


def _check_replaced(recorder: _Recorder, model: Any) -> None:
    for name, parameter in model.named_parameters():
        if recorder.parameters.get(storage_of(parameter)) != name:
            recorder.changed.setdefault(name, set())


def _as_trace(
    recorder: _Recorder, parameters: Mapping[str, Tensor], tensors: Mapping[str, tuple[int, ...]], dtype: str
) -> Trace:
    found: list[tuple[str, list[Piece]]] = []
    written = dict.fromkeys(parameters, 0)
    for copied in recorder.copies:
        pieces = pieces_of(copied, tensors[copied.name])
        written[copied.parameter] += copied.target.numel()
        # What is written twice depends on the order, which a plan does not keep.
        if pieces is None or written[copied.parameter] > parameters[copied.parameter].numel():
            recorder.changed.setdefault(copied.parameter, set()).add(copied.name)
        else:
            found.append((copied.parameter, pieces))
    modules = {name.rpartition(".")[0] for name in recorder.changed}
    ordinary = {one for names in recorder.changed.values() for one in names}
    ordinary |= {copied.name for copied in recorder.copies if copied.parameter.rpartition(".")[0] in modules}
    if modules:
        # A loader that collects several tensors writes none of them itself: what nothing copies may be among these.
        ordinary |= tensors.keys() - {copied.name for copied in recorder.copies}
    needs = []
    for parameter, pieces in found:
        if parameter.rpartition(".")[0] not in modules:
            to = str(parameters[parameter].dtype).removeprefix("torch.")
            needs += [Need(piece, to) for piece in pieces]
    for name in tensors:
        if name in ordinary:
            shape = tensors[name]
            needs.append(Need(Piece(whole(name, shape), ORDINARY + name, 0, contiguous(shape)), dtype))
    buffers = {
        name: Buffer(tuple(one.shape), str(one.dtype).removeprefix("torch."), written[name] == one.numel())
        for name, one in parameters.items()
        if name.rpartition(".")[0] not in modules
    }
    return Trace(tuple(needs), buffers, tuple(name for name in tensors if name in ordinary))


def pieces_of(copied: Copied, shape: tuple[int, ...]) -> list[Piece] | None:
    """A copy as affine pieces of the HF tensor; None where its view is no such thing.

    There are none where a rank's share is empty: of a short vocabulary the last ranks hold padding only.
    """
    if not copied.source.numel():
        return []
    unit, offset = contiguous(shape), copied.source.storage_offset()
    start = [offset // step % size for step, size in zip(unit, shape, strict=True)]
    dims: list[list[tuple[int, int, int]]] = [[] for _ in shape]
    views = zip(copied.source.shape, copied.source.stride(), copied.target.stride(), strict=True)
    for count, stride, target in views:
        if count > 1:
            axis = next((axis for axis, step in enumerate(unit) if 0 < step <= stride and shape[axis] > 1), None)
            if axis is None or stride % unit[axis]:
                return None
            dims[axis].append((count, stride // unit[axis], target))
    inner = [min(several, key=lambda dim: dim[1]) if several else (1, 1, 0) for several in dims]
    outer = [(axis, dim) for axis, several in enumerate(dims) for dim in several if dim is not inner[axis]]
    pieces = []
    for index in product(*(range(count) for _, (count, _, _) in outer)):
        first, at = list(start), int(copied.target.storage_offset())
        for place, (axis, (_, step, target)) in zip(index, outer, strict=True):
            first[axis] += place * step
            at += place * target
        axes = tuple(range(f, f + (n - 1) * step + 1, step) for f, (n, step, _) in zip(first, inner, strict=True))
        if any(one[-1] >= size for one, size in zip(axes, shape, strict=True)):
            return None
        pieces.append(Piece(Region(copied.name, axes), copied.parameter, at, tuple(target for _, _, target in inner)))
    return pieces
