"""One forward, or forward and backward, of a global batch through Megatron's schedules, on any layout.

`model` is one chunk of blocks, or the list of a rank's chunks (virtual pipeline stages), wrapped for training or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from nla_megatron.models.batching import Batch, check_ids, microbatches
from nla_megatron.models.builder import chunks_of
from nla_megatron.models.interventions import check_parts
from nla_megatron.parallel.collectives import sum_over_world
from nla_megatron.parallel.cpu import megatron_device
from nla_megatron.parallel.world import World
from nla_megatron.types import Microbatch

Loss = Callable[[Tensor, Microbatch], tuple[Tensor, Mapping[str, Tensor]]]
"""(output, microbatch) -> (loss, statistics); both already divided by the *global* batch's denominators."""
Collect = Callable[[Tensor, Microbatch], Tensor]
"""(output, microbatch) -> one row of numbers per microbatch row, (B,) or (B, T)."""


def forward_backward(
    model: Any, batch: Batch, world: World, micro_batch_size: int, loss: Loss
) -> list[Mapping[str, Tensor]]:
    """Accumulate gradients of the loss summed over the global batch; statistics per microbatch, on the last stage."""
    parts = microbatches(batch, world, micro_batch_size)
    seen: list[Mapping[str, Tensor]] = []
    # Megatron divides by the microbatches, its data-parallel wrapper by the ranks; the loss is a sum over all of them.
    scale = len(parts) * world.dp

    def finish(output: Tensor, part: Microbatch) -> tuple[Tensor, dict[str, Any]]:
        value, statistics = loss(output, part)
        seen.append(statistics)
        return value * scale, {}

    _run(model, parts, finish, forward_only=False)
    return seen


@torch.no_grad()
def forward_each(
    model: Any,
    parts: Sequence[Microbatch],
    world: World,
    visit: Callable[[Tensor, Microbatch], None],
    training: bool = False,
) -> None:
    """Forward of microbatches without gradients; `visit` sees each output on the last stage.

    Args:
        training: with dropout, as a training step on the same microbatches has it.
    """

    def finish(output: Tensor, part: Microbatch) -> tuple[Tensor, dict[str, Any]]:
        visit(output, part)
        return torch.zeros((), device=world.device), {}

    was_training = [chunk.training for chunk in chunks_of(model)]
    for chunk in chunks_of(model):
        chunk.train(training)
    _run(model, parts, finish, forward_only=True)
    for chunk, before in zip(chunks_of(model), was_training, strict=True):
        chunk.train(before)


def forward_rows(
    model: Any, batch: Batch, world: World, micro_batch_size: int, collect: Collect, width: int | None = None
) -> Tensor:
    """Numbers for every row of the batch on every rank: (N,) or, with `width`, (N, width); fp32, without gradients."""
    total = torch.zeros(len(batch), *(() if width is None else (width,)))

    def visit(output: Tensor, part: Microbatch) -> None:
        values = collect(output, part).float().cpu()
        if not world.speaks_for_its_rows:
            return
        for value, row, weight in zip(values, part.rows.tolist(), part.weights.tolist(), strict=True):
            if weight:
                # Sequence parallelism may have filled the rows up beyond the longest.
                total[(row, slice(0, len(value))) if width is not None else row] = value[:width] if width else value

    forward_each(model, microbatches(batch, world, micro_batch_size), world, visit)
    return sum_over_world(total, world)


def _run(model: Any, parts: Sequence[Microbatch], finish: Callable, forward_only: bool) -> None:
    chunks = chunks_of(model)
    check_parts(chunks[0], parts)
    shape = getattr(chunks[0], "module", chunks[0]).shape
    check_ids(max(int(part.ids.max()) for part in parts), shape.vocab_size)

    def forward_step(
        remaining: Iterator[Microbatch], chunk: Any
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, dict[str, Any]]]]:
        part = next(remaining)
        return chunk(part), lambda output: finish(output, part)

    with megatron_device():
        get_forward_backward_func()(
            forward_step_func=forward_step,
            # Interleaved stages run their chunks in turn, and each one sees every microbatch.
            data_iterator=[iter(parts) for _ in chunks],
            model=chunks,
            num_microbatches=len(parts),
            seq_length=parts[0].ids.shape[1],
            micro_batch_size=parts[0].ids.shape[0],
            forward_only=forward_only,
        )
