"""Which layouts a model fits, the trainer's and the sampler's; how its blocks are dealt to the pipeline.

Imports no Megatron.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import torch

from nla_megatron.errors import LayoutError
from nla_megatron.parallel.world import World
from nla_megatron.types import Experts, ModelShape

if TYPE_CHECKING:
    from nla_megatron.config.schema import ParallelConfig

_VLLM_ROWS = 64
"""vLLM pads the vocabulary to a multiple of it."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Use = Literal["convert", "forward", "train"]
"""What a layout is for: moving weights only, computing without gradients, or learning."""


class Layout(Protocol):
    """What `ParallelConfig` and `World` both say of a layout; `etp` None is tp."""

    @property
    def tp(self) -> int: ...
    @property
    def pp(self) -> int: ...
    @property
    def ep(self) -> int: ...
    @property
    def etp(self) -> int | None: ...
    @property
    def vpp(self) -> int: ...
    @property
    def stages(self) -> list[int] | tuple[int, ...] | None: ...
    @property
    def sequence_parallel(self) -> bool: ...


Dealt = TypeVar("Dealt", "ParallelConfig", World)


def beside_av(layout: Dealt) -> Dealt:
    """The layout of an AR that learns beside an AV: the same ranks, its own division into stages."""
    return replace(layout, stages=layout.ar_stages, ar_stages=None)


def check_layout(shape: ModelShape, layout: Layout, use: Use = "train", stages: str = "stages") -> None:
    """Whether this model can be cut so; `stages` is the key of `parallel` that `layout.stages` come from.

    Raises:
        LayoutError: heads, groups, columns, experts or blocks do not fit, or the layout is not made for `use`.
    """
    cut = {"attention heads": shape.num_heads, "key/value heads": shape.num_kv_heads}
    cut["vocabulary rows (padded)"] = shape.padded_vocab_size
    if shape.experts is None:
        cut["feed-forward columns"] = shape.ffn_hidden_size
    for name, size in cut.items():
        _check_divides("parallel.tp", layout.tp, size, name)
    _check_experts(shape.experts, layout)
    _check_blocks(shape.num_layers, layout, f"parallel.{stages}")
    if use == "convert":
        return
    if layout.vpp > 1:
        raise LayoutError(
            f"parallel.vpp={layout.vpp} for a model that computes", "one chunk of blocks per pipeline stage",
            "drop parallel.vpp; only conversion takes it",
        )  # fmt: skip
    if shape.experts is not None and layout.sequence_parallel and layout.tp > 1:
        raise LayoutError(
            "a mixture of experts with parallel.sequence_parallel", "parallel.sequence_parallel=false",
            "switch it off: only decoders without experts were compared with a reference under it",
        )  # fmt: skip
    if use == "train" and shape.experts is not None and layout.tp > 1:
        raise LayoutError(
            f"a mixture of experts that trains at parallel.tp={layout.tp}", "parallel.tp=1",
            "share the experts out with parallel.ep: megatron-core trains experts at tp > 1 with sequence parallelism"
            " only",
        )  # fmt: skip


def check_rollout_layout(
    shape: ModelShape, tp: int, world_size: int, expert_parallel: bool = False, key: str = "rollout.tp"
) -> None:
    """Whether vLLM's replicas of `tp` ranks tile the world and can cut this model; `key` is what sets `tp`.

    Raises:
        LayoutError: they do not.
    """
    _check_divides(key, tp, world_size, "ranks")
    _check_divides(key, tp, shape.num_heads, "attention heads")
    if tp < shape.num_kv_heads or tp % shape.num_kv_heads:  # else each lies on several ranks
        _check_divides(key, tp, shape.num_kv_heads, "key/value heads")
    _check_divides(key, tp, -(-shape.vocab_size // _VLLM_ROWS) * _VLLM_ROWS, "vocabulary rows (padded)")
    if shape.experts is None:
        _check_divides(key, tp, shape.ffn_hidden_size, "feed-forward columns")
        if expert_parallel:
            raise LayoutError("expert_parallel=true for a model without experts", "false", "drop expert_parallel")
    elif not expert_parallel:
        _check_divides(key, tp, shape.experts.ffn_hidden_size, "columns of each expert")


def _check_divides(key: str, ranks: int, size: int, name: str) -> None:
    if size % ranks:
        short = key.removeprefix("parallel.")
        raise LayoutError(f"{size} {name} at {key}={ranks}", f"a {short} that divides {size}", f"choose another {key}")


def _check_experts(experts: Experts | None, layout: Layout) -> None:
    if experts is not None:
        _check_divides("parallel.ep", layout.ep, experts.count, "experts")
        _check_divides("parallel.etp", layout.etp or layout.tp, experts.ffn_hidden_size, "columns of each expert")
    elif layout.ep > 1:
        raise LayoutError(f"parallel.ep={layout.ep} for a model without experts", "parallel.ep=1", "drop parallel.ep")


def _check_blocks(num_layers: int, layout: Layout, key: str) -> None:
    chunks = layout.pp * layout.vpp
    if num_layers < chunks:
        raise LayoutError(
            f"{num_layers} blocks at parallel.pp={layout.pp}" + (f", vpp {layout.vpp}" if layout.vpp > 1 else ""),
            "at least one block for each pipeline stage", "lower parallel.pp",
        )  # fmt: skip
    if layout.stages is not None and (len(layout.stages) != chunks or sum(layout.stages) != num_layers):
        raise LayoutError(
            f"{key}={list(layout.stages)} for {num_layers} blocks on pp {layout.pp} x vpp {layout.vpp}",
            f"{chunks} numbers that sum to {num_layers}",
            f"correct {key}, or leave it out for an even division",
        )


def blocks_per_chunk(num_layers: int, layout: Layout) -> list[int]:
    """Blocks of each of the pp x vpp chunks in the model's order.

    The first ones take the remainder: 3 blocks over 2 stages are [2, 1].
    """
    if layout.stages is not None:
        return list(layout.stages)
    chunks = layout.pp * layout.vpp
    return [num_layers // chunks + (chunk < num_layers % chunks) for chunk in range(chunks)]


def placed(model: torch.nn.Module, world: World, dtype: str) -> None:
    """Move a built model to its device with every parameter but those of an AR's head in `dtype`."""
    model.to(world.device)
    for name, parameter in model.named_parameters():
        if not name.startswith("value_head."):
            parameter.data = parameter.data.to(DTYPES[dtype])


def chunks_of(model: Any) -> list[Any]:
    """A model's chunks: several with virtual pipeline stages."""
    return list(model) if isinstance(model, list | tuple) else [model]
