"""What the AR learns by: a distance of prediction and activation, and two regularisers of the predictions.

With p the head's predictions, p̂ and ĥ predictions and activations at the contract's scale (norm √D), N rows of the
global batch:
    mse         mean_N mean_D (p̂ − ĥ)²
    smooth_l1   mean_N mean_D of d²/2β where |d| < β, |d| − β/2 elsewhere, d = p̂ − ĥ
    cosine      mean_N (1 − cos(p, h))
    l2          mean_N mean_D p²: keeps the length of the predictions, which the distances do not see, from growing
    variance    mean_D (std_N(p̂) − std_N(ĥ))²: predictions that all lie near the mean are too little apart
Everything is a sum over the global batch, so neither the layout nor the size of a microbatch changes a gradient. A
variance is no sum; `_spread` says how it becomes one. Legend: B rows of a microbatch, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from nla_megatron import geometry
from nla_megatron.config.schema import ArLossConfig
from nla_megatron.models.batching import Batch
from nla_megatron.models.pipeline import Loss
from nla_megatron.parallel.collectives import sum_over_world
from nla_megatron.tasks.nla import MSE_SCALE, squared_error
from nla_megatron.training.module import TrainModule, Update
from nla_megatron.types import Microbatch

_LEAST_VARIANCE = 1e-6  # keeps the slope of the standard deviation finite where there is no spread


@dataclass(frozen=True)
class Spread:
    """The variance penalty of one global batch as a sum over its rows.

    `penalty`: its value. `mean_slope_D`, `square_slope_D`: its derivatives by the means over the batch of p̂ and p̂².
    """

    penalty: float
    mean_slope_D: Tensor
    square_slope_D: Tensor

    def surrogate(self, normal_BD: Tensor) -> Tensor:
        """A term per row (B,), linear in p̂ and p̂², whose mean over the batch has the penalty's gradient."""
        return (self.mean_slope_D * normal_BD + self.square_slope_D * normal_BD.square()).sum(dim=-1)


class ReconstructionLoss:
    """A configured loss; `update` is one optimizer step of an AR by it.

    Example:
        >>> done = make_reconstruction_loss(config.ar_loss).update(module, batch, step)
        >>> done.statistics["loss"], done.statistics["mse"]
    """

    def __init__(self, config: ArLossConfig):
        self.config = config
        own = {"ar_l2": config.l2_reg, "ar_variance": config.variance_reg}
        self.names = ("loss", "mse", *(name for name, factor in own.items() if factor))

    def update(self, module: TrainModule, batch: Batch, step: int) -> Update:
        """One step over a global batch of texts with their activations; statistics by `names`, `loss` in all.

        The step is the schedule's and the dropout's.
        """
        batch = replace(batch, training_step=step)
        spread = _spread(module, batch) if self.config.variance_reg else None
        return module.update(batch, self.of(len(batch), spread), self.names, step)

    def of(self, total_rows: int, spread: Spread | None = None) -> Loss:
        """The loss of a global batch of `total_rows`; with `variance_reg` it needs the batch's `spread`."""
        config = self.config

        def loss(predicted_BD: Tensor, part: Microbatch) -> tuple[Tensor, Mapping[str, Tensor]]:
            share_B = part.weights / total_rows
            mse_B = squared_error(predicted_BD, part)
            value = config.weight * (self._distance(predicted_BD, part, mse_B) * share_B).sum()
            shown, statistics = value.detach(), {"mse": (mse_B.detach() * share_B).sum()}
            if config.l2_reg:
                l2 = (predicted_BD.float().square().mean(dim=-1) * share_B).sum()
                value, shown = value + config.l2_reg * l2, shown + config.l2_reg * l2.detach()
                statistics["ar_l2"] = l2.detach()
            if spread is not None:
                terms_B = spread.surrogate(geometry.normalise(predicted_BD, MSE_SCALE))
                penalty = spread.penalty * share_B.sum()
                value = value + config.variance_reg * (terms_B * share_B).sum()
                shown, statistics["ar_variance"] = shown + config.variance_reg * penalty, penalty
            return value, {"loss": shown, **statistics}

        return loss

    def _distance(self, predicted_BD: Tensor, part: Microbatch, mse_B: Tensor) -> Tensor:
        if self.config.kind == "mse":
            return mse_B
        assert part.vectors is not None
        if self.config.kind == "cosine":
            return 1 - geometry.cosine(predicted_BD, part.vectors)
        normal_BD = geometry.normalise(predicted_BD, MSE_SCALE)
        target_BD = geometry.normalise(part.vectors, MSE_SCALE)
        apart = F.smooth_l1_loss(normal_BD, target_BD, reduction="none", beta=self.config.smooth_l1_beta)
        return apart.mean(dim=-1)


def make_reconstruction_loss(config: ArLossConfig) -> ReconstructionLoss:
    """The loss of an AR as configured."""
    return ReconstructionLoss(config)


def reconstruction(total_rows: int) -> Loss:
    """Mean squared error over all rows of the global batch, at the scale of the contract."""
    return ReconstructionLoss(ArLossConfig()).of(total_rows)


def _spread(module: TrainModule, batch: Batch) -> Spread:
    """The penalty's value and slopes at the present weights.

    The penalty is a function of 2D means over the global batch. A first forward pass without gradients, with the
    dropout of the step that follows, sums p̂ and p̂² over all ranks; the slopes by the two means are then constants, and
    by the chain rule the gradient of the penalty is that of `Spread.surrogate`, a sum over rows. So it is exact
    on every layout and at every size of a microbatch.
    """
    width = module.chunks[0].shape.hidden_size
    sums_4D = torch.zeros(4, width, dtype=torch.float64)

    def add(predicted_BD: Tensor, part: Microbatch) -> None:
        assert part.vectors is not None
        for first, vectors_BD in ((0, predicted_BD), (2, part.vectors)):
            normal_BD = (geometry.normalise(vectors_BD, MSE_SCALE) * part.weights[:, None]).double().cpu()
            sums_4D[first] += normal_BD.sum(dim=0)
            sums_4D[first + 1] += normal_BD.square().sum(dim=0)

    module.visit(batch, add)
    speaks = module.world.speaks_for_its_rows
    total_4D = sum_over_world(sums_4D if speaks else torch.zeros_like(sums_4D), module.world) / len(batch)
    mean_D, square_D, target_mean_D, target_square_D = total_4D
    std_D, target_std_D = _std(mean_D, square_D), _std(target_mean_D, target_square_D)
    apart_D = std_D - target_std_D
    # d penalty / d variance; the variance is the mean of squares less the square of the mean.
    slope_D = apart_D / std_D / width
    slopes = (each.float().to(module.world.device) for each in (-2 * mean_D * slope_D, slope_D))
    return Spread(float(apart_D.square().mean()), *slopes)


def _std(mean_D: Tensor, square_D: Tensor) -> Tensor:
    return ((square_D - mean_D.square()).clamp_min(0) + _LEAST_VARIANCE).sqrt()
