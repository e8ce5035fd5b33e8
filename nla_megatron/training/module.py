"""A model that learns: DDP wrapper, optimizer and schedule around a Megatron model. Every stage updates through it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nla_megatron.config.schema import OptimConfig
from nla_megatron.models.batching import Batch, microbatches
from nla_megatron.models.builder import DTYPES, chunks_of
from nla_megatron.models.pipeline import Collect, Loss, forward_backward, forward_each, forward_rows
from nla_megatron.parallel.collectives import max_over_world, sum_statistics
from nla_megatron.parallel.cpu import megatron_device
from nla_megatron.parallel.world import World
from nla_megatron.training.optimizer import (
    RESHARDABLE,
    build_optimizer,
    learning_rate,
    materialise_state,
    separate_steps,
)
from nla_megatron.training.tally import Tally
from nla_megatron.types import Microbatch


@dataclass(frozen=True)
class Update:
    """What one optimizer step reports: sums (and maxima, `*_max`) over the global batch."""

    statistics: dict[str, float]
    grad_norm: float
    learning_rate: float
    skipped: bool


class TrainModule:
    """One model's forward, backward, optimizer step and state, on any layout.

    `model` is one chunk of blocks, or the list of a rank's chunks (virtual pipeline stages).
    """

    def __init__(
        self, model: Any, world: World, config: OptimConfig, total_steps: int, micro_batch_size: int, dtype: str
    ):
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )

        self.model, self.world, self.config, self.total_steps = model, world, config, total_steps
        self.micro_batch_size = micro_batch_size
        options = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        self.chunks = chunks_of(model)
        for chunk in self.chunks:
            chunk.config.finalize_model_grads_func = finalize_model_grads
        with megatron_device():
            self.wrapped = [DistributedDataParallel(chunk.config, options, chunk) for chunk in self.chunks]
        self.optimizer, self.tally = build_optimizer(self.wrapped, config, DTYPES[dtype]), Tally()

    def update(
        self,
        batch: Batch,
        loss: Loss,
        names: tuple[str, ...],
        step: int,
        check: Callable[[dict[str, float]], None] | None = None,
    ) -> Update:
        """One optimizer step of `loss` over a global batch.

        Args:
            batch: the global batch, the same on every rank.
            loss: per microbatch; see `models.pipeline.Loss`.
            names: the statistics that `loss` reports, `*_max` by maximum and the rest by sum.
            step: the schedule's step, 0-based.
            check: sees the statistics before the parameters change; raising stops the run on all ranks.

        Gradients that are not finite skip the step, on all ranks alike, because their norm is global.
        """
        for chunk in self.wrapped:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        seen = forward_backward(self.wrapped, batch, self.world, self.micro_batch_size, loss)
        statistics = self._reduce(seen, names)
        if check is not None:
            check(statistics)
        rate = learning_rate(self.config, step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with megatron_device():
            self.optimizer.prepare_grads()
            norm = float(self.optimizer.get_grad_norm())
            finite = norm == norm and norm != float("inf")
            if finite:
                self.optimizer.step()
        self.tally.count(skipped=not finite)
        return Update(statistics, norm, rate, skipped=not finite)

    def rows(self, batch: Batch, collect: Collect, width: int | None = None) -> Tensor:
        """Per-row numbers without gradients; see `models.pipeline.forward_rows`."""
        return forward_rows(self.wrapped, batch, self.world, self.micro_batch_size, collect, width)

    def visit(self, batch: Batch, seen: Callable[[Tensor, Microbatch], None]) -> None:
        """A forward pass as `update` makes it, dropout included, without gradients; `seen` on the last stage."""
        forward_each(self.wrapped, microbatches(batch, self.world, self.micro_batch_size), self.world, seen, True)

    def _reduce(self, seen: list[Mapping[str, Tensor]], names: tuple[str, ...]) -> dict[str, float]:
        speaks = self.world.speaks_for_its_rows
        sums = {
            name: sum(float(part[name]) for part in seen) if speaks else 0.0
            for name in names
            if not name.endswith("_max")
        }
        reduced = sum_statistics(sums, tuple(sums), self.world)
        for name in names:
            if name.endswith("_max"):
                reduced[name] = max_over_world(
                    max((float(part[name]) for part in seen), default=0.0) if speaks else 0.0, self.world
                )
        return reduced

    def state(self, loading: bool) -> dict[str, Any]:
        """The sharded state of model and optimizer, for `dist_checkpointing`."""
        materialise_state(self.optimizer)
        # Megatron adds the process group of the layout to the metadata it is given.
        metadata = dict(RESHARDABLE)
        weights = sharded_weights(self.chunks, metadata)
        optimizer = self.optimizer.sharded_state_dict(weights, is_loading=loading, metadata=metadata)
        return {**weights, "optimizer": optimizer}

    def load_state(self, loaded: dict[str, Any]) -> None:
        take_weights(self.chunks, loaded)
        self.optimizer.load_state_dict(loaded["optimizer"])
        separate_steps(self.optimizer)


def sharded_weights(chunks: Sequence[Any], metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    """What learns of a rank's chunks, for `dist_checkpointing`; tensors in it are the parameters themselves.

    What is frozen is in the directory that the run starts from, and a checkpoint would hold it once more.
    """
    state = {}
    for name, chunk in zip(_names(chunks), chunks, strict=True):
        whole, frozen = chunk.sharded_state_dict(metadata=metadata), _frozen(chunk)
        state[name] = {key: value for key, value in whole.items() if key not in frozen}
    return state


def take_weights(chunks: Sequence[Any], loaded: Mapping[str, Any]) -> None:
    """What `sharded_weights` described, once it is loaded."""
    for name, chunk in zip(_names(chunks), chunks, strict=True):
        chunk.load_state_dict({**_frozen(chunk), **loaded[name]})


def _frozen(chunk: Any) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in chunk.named_parameters() if not parameter.requires_grad}


def _names(chunks: Sequence[Any]) -> list[str]:
    """Of the chunks in the state, as megatron-core's own trainer names them."""
    return [f"model{number}" if len(chunks) > 1 else "model" for number in range(len(chunks))]
