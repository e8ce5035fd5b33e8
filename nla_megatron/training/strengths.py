"""A policy that is a frozen model and a small predictor of how strongly it is steered: what learns is the predictor.

The loss of the steered log-probs goes back through the frozen model into the strengths, on the pipeline stage whose
block is steered; summed over stages, data-parallel ranks and microbatches, it goes on into the predictor, which is
alike on every rank. Legend: N rows of a batch, S strengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nla_megatron.config.schema import OptimConfig
from nla_megatron.interventions.spec import Intervention
from nla_megatron.models.batching import Batch
from nla_megatron.models.builder import chunks_of
from nla_megatron.models.pipeline import Collect, Loss, forward_backward, forward_rows
from nla_megatron.models.prompt_features import Ids, PromptFeatures, predicted
from nla_megatron.models.strength import PredictorConfig, StrengthPredictor, columns_of, dropout_seed
from nla_megatron.parallel.collectives import max_over_world, sum_over_world, sum_statistics
from nla_megatron.parallel.world import World
from nla_megatron.training.module import Update
from nla_megatron.training.optimizer import learning_rate
from nla_megatron.training.reference import MovingCopy
from nla_megatron.training.tally import Tally
from nla_megatron.types import Steering

_MOMENTS = ("exp_avg", "exp_avg_sq")


class StrengthPolicy:
    """What `rl` updates in place of a `TrainModule`: its numbers are the steered model's, whatever `only` a batch has.

    Args:
        model: a language model with `interventions`; its parameters are frozen here.
        seed: of the predictor's weights and dropout.

    Raises:
        WidthError: a batch steered otherwise than the model.
    """

    def __init__(
        self, model: Any, interventions: Sequence[Intervention], predictor: PredictorConfig, world: World,
        config: OptimConfig, total_steps: int, micro_batch_size: int, seed: int,
    ):  # fmt: skip
        self.chunks, self.world, self.config, self.total_steps = chunks_of(model), world, config, total_steps
        self.micro_batch_size, self.seed = micro_batch_size, seed
        for chunk in self.chunks:
            chunk.requires_grad_(False)
        self.columns = columns_of(interventions)
        self.features = PromptFeatures(self.chunks, world, micro_batch_size)
        count = max(last for _, last in filter(None, self.columns))
        self.predictor = StrengthPredictor(self.features.width, count, predictor, seed).to(world.device)
        self.optimizer = torch.optim.AdamW(
            self.predictor.parameters(), config.lr, (config.beta1, config.beta2), weight_decay=config.weight_decay
        )
        self._unsteered, self.tally = False, Tally()

    @torch.no_grad()
    def strengths(self, prompts: Sequence[Ids], step: int | None) -> Tensor:
        """(N, S) on the CPU, by the present predictor; `step` is the one whose dropout is drawn, None for none."""
        return self._predict(list(prompts), step).cpu()

    def _predict(self, prompts: list[Ids], step: int | None) -> Tensor:
        """(N, S) on the device."""
        seed_of = None if step is None else partial(dropout_seed, self.seed, step)
        return predicted(self.predictor, self.features, prompts, seed_of)

    def update(
        self, batch: Batch, loss: Loss, names: tuple[str, ...], step: int,
        check: Callable[[dict[str, float]], None] | None = None,
    ) -> Update:  # fmt: skip
        """One optimizer step of the predictor, for the loss of the steered model over a global batch.

        Args and what is skipped: as `TrainModule.update`.
        """
        self.predictor.train()
        chosen_NS = self._predict(_prompts(batch), batch.training_step)
        leaf_NS = chosen_NS.detach().requires_grad_()
        for chunk in self.chunks:
            chunk.train()
        steered = replace(batch, only=None, steering=Steering(leaf_NS, self.columns))
        seen = forward_backward(self.chunks, steered, self.world, self.micro_batch_size, loss)
        statistics = self._reduced(seen, names)
        if check is not None:
            check(statistics)
        return self._step(chosen_NS, self._whole_gradient(leaf_NS), statistics, step)

    def fit(self, prompts: Sequence[Ids], targets_NS: Tensor, step: int) -> Update:
        """One optimizer step towards given strengths: mean squared error over prompts and strengths."""
        self.predictor.train()
        chosen_NS = self._predict(list(prompts), step)
        difference_NS = chosen_NS.detach() - targets_NS.to(self.world.device)
        statistics = {"loss": float(difference_NS.square().mean())}
        return self._step(chosen_NS, 2 * difference_NS / difference_NS.numel(), statistics, step)

    def _whole_gradient(self, leaf_NS: Tensor) -> Tensor:
        """Of the loss of the global batch, on every rank.

        The stream, and so its gradient, is alike on the ranks of tensor parallelism; with sequence parallelism each
        of them has the steered tokens of its own part. Every other rank has rows or blocks that nobody else has.
        """
        mine = self.world.tp_rank == 0 or self.world.sequence_parallel
        here = leaf_NS.grad if mine and leaf_NS.grad is not None else torch.zeros_like(leaf_NS)
        # `forward_backward` makes up for an average over DP ranks that only Megatron's wrapper would take.
        return (sum_over_world(here, self.world) / self.world.dp).to(leaf_NS)

    def _step(self, chosen_NS: Tensor, gradient_NS: Tensor, statistics: dict[str, float], step: int) -> Update:
        rate = learning_rate(self.config, step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        chosen_NS.backward(gradient_NS)
        self._agree_on_gradients()
        limit = self.config.clip_grad if self.config.clip_grad > 0 else float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(self.predictor.parameters(), limit))
        finite = norm == norm and norm != float("inf")
        if finite:
            self.optimizer.step()
        self.tally.count(skipped=not finite)
        return Update(statistics, norm, rate, skipped=not finite)

    def _agree_on_gradients(self) -> None:
        """Everybody takes rank 0's: rounding that differs between devices would let the predictors drift apart."""
        if self.world.size == 1:
            return
        gradients = [parameter.grad for parameter in self.predictor.parameters() if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients]).cpu()
        dist.broadcast(flat, src=0, group=self.world.control)
        for gradient, part in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def rows(self, batch: Batch, collect: Collect, width: int | None = None) -> Tensor:
        """Per-row numbers of the steered model without gradients; see `models.pipeline.forward_rows`."""
        if self._unsteered:
            batch = replace(batch, only=[()] * len(batch), steering=None)
        else:
            with torch.no_grad():
                values_NS = self._predict(_prompts(batch), batch.training_step)
            batch = replace(batch, only=None, steering=Steering(values_NS, self.columns))
        return forward_rows(self.chunks, batch, self.world, self.micro_batch_size, collect, width)

    @contextmanager
    def unsteered(self) -> Iterator[None]:
        """Inside, `rows` is of the frozen model as it is."""
        self._unsteered = True
        try:
            yield
        finally:
            self._unsteered = False

    def _reduced(self, seen: Sequence[Mapping[str, Tensor]], names: tuple[str, ...]) -> dict[str, float]:
        speaks = self.world.speaks_for_its_rows
        most = [name for name in names if name.endswith("_max")]
        sums = {name: sum(float(part[name]) for part in seen) if speaks else 0.0 for name in names if name not in most}
        reduced = sum_statistics(sums, tuple(sums), self.world)
        for name in most:
            here = max((float(part[name]) for part in seen), default=0.0) if speaks else 0.0
            reduced[name] = max_over_world(here, self.world)
        return reduced

    def state(self, loading: bool) -> dict[str, Any]:
        """Predictor and its moments for `dist_checkpointing`."""
        return written_once(self._tensors(), self.world)

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        steps = torch.zeros(1)
        for name, parameter in self.predictor.named_parameters():
            moments = self.optimizer.state.get(parameter, {})
            steps = torch.as_tensor(moments.get("step", 0.0)).detach().reshape(1).float().cpu()
            tensors[f"predictor.{name}"] = parameter.detach()
            for moment in _MOMENTS:
                tensors[f"optimizer.{moment}.{name}"] = moments.get(moment, torch.zeros_like(parameter)).detach()
        return {**tensors, "optimizer.step": steps}

    @torch.no_grad()
    def load_state(self, loaded: dict[str, Any]) -> None:
        for name, parameter in self.predictor.named_parameters():
            parameter.copy_(loaded[f"predictor.{name}"])
            moments = {moment: loaded[f"optimizer.{moment}.{name}"].to(parameter).clone() for moment in _MOMENTS}
            self.optimizer.state[parameter] = {"step": loaded["optimizer.step"].reshape(()).clone(), **moments}


class Unsteered:
    """The frozen model as it is, for a reference."""

    def __init__(self, policy: StrengthPolicy):
        self.in_place = policy.unsteered

    def follow(self) -> None:
        """It never learns."""


class MovingPredictor(MovingCopy):
    """A moving average of a predictor, which is alike on every rank."""

    def __init__(self, predictor: StrengthPredictor, decay: float, world: World):
        super().__init__(predictor, decay)
        self.names, self.world = [name for name, _ in predictor.named_parameters()], world

    def state(self, loading: bool) -> dict[str, Any]:
        return written_once(dict(zip(self.names, self.kept, strict=True)), self.world)

    def load_state(self, loaded: dict[str, Any]) -> None:
        for name, kept in zip(self.names, self.kept, strict=True):
            kept.copy_(loaded[name])


def written_once(tensors: Mapping[str, Tensor], world: World) -> dict[str, Any]:
    """Tensors that every rank has whole, as `dist_checkpointing` takes them."""
    from megatron.core.dist_checkpointing import ShardedTensor

    return {
        name: ShardedTensor.from_rank_offsets(name, values, replica_id=world.rank) for name, values in tensors.items()
    }


def _prompts(batch: Batch) -> list[Ids]:
    assert batch.prompt_lengths is not None, "batches of a steered policy say where their prompts end"
    return [tuple(ids[:length]) for ids, length in zip(batch.ids, batch.prompt_lengths, strict=True)]
