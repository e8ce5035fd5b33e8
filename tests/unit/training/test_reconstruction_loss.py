"""What the AR learns by, against torch's own losses on the whole batch at once. Legend: N rows, D hidden."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nla_megatron import geometry
from nla_megatron.config.schema import ArLossConfig, OptimConfig
from nla_megatron.contract.blocks import ReconstructorSpec
from nla_megatron.conversion.hf import read_shape
from nla_megatron.conversion.live import load_reconstructor
from nla_megatron.errors import ConfigError
from nla_megatron.models.batching import Batch, microbatches
from nla_megatron.parallel.world import World
from nla_megatron.tasks.nla import squared_error
from nla_megatron.training.losses import make_reconstruction_loss, reconstruction
from nla_megatron.training.module import TrainModule
from tests.support.tiny import SHAPE, tiny_model

LENGTHS = (9, 4, 2, 12, 7)
N, D = len(LENGTHS), SHAPE.hidden_size
OPTIM = OptimConfig(lr=0.0, warmup_steps=0, schedule="constant", clip_grad=1e9)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base"), num_layers=2)


@pytest.fixture(scope="module")
def batch() -> Batch:
    rng = np.random.default_rng(5)
    vectors = rng.standard_normal((N, D)).astype(np.float32) * 4 + 1
    ids = [rng.integers(3, SHAPE.vocab_size, length).tolist() for length in LENGTHS]
    return Batch(ids=ids, vectors=lambda rows: vectors[list(rows)])


def module(directory: Path, world: World, micro: int) -> TrainModule:
    spec = ReconstructorSpec("mean", 2, dropout=0.25, layer=1)
    model = load_reconstructor(str(directory), read_shape(directory), world, "float32", spec, seed=3)
    return TrainModule(model, world, OPTIM, 10, micro, "float32")


def gradients(made: TrainModule) -> dict[str, Tensor]:
    # Megatron accumulates there, scaled by nothing in a world of one.
    return {name: parameter.main_grad.clone() for name, parameter in made.model.named_parameters()}


def predictions(made: TrainModule, batch: Batch, step: int) -> Tensor:
    """Of all rows in one forward pass of the model itself, with the step's dropout and with gradients."""
    [part] = microbatches(replace(batch, training_step=step), made.world, N)
    made.model.train()
    out = torch.empty(N, D)
    found = made.model(part)
    return out.index_copy(0, part.rows, found)


def at_scale(v: Tensor) -> Tensor:
    return v * (D**0.5 / v.norm(dim=1, keepdim=True))


def std(v: Tensor) -> Tensor:
    return (v.var(dim=0, correction=0) + 1e-6).sqrt()


CASES: dict[str, tuple[dict[str, Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "mse": ({}, lambda p, h: F.mse_loss(at_scale(p), at_scale(h))),
    "smooth_l1": (
        {"kind": "smooth_l1", "smooth_l1_beta": 0.7},
        lambda p, h: F.smooth_l1_loss(at_scale(p), at_scale(h), beta=0.7),
    ),
    "cosine": ({"kind": "cosine", "weight": 3.0}, lambda p, h: 3 * (1 - F.cosine_similarity(p, h)).mean()),
    "l2": ({"weight": 0.5, "l2_reg": 0.3}, lambda p, h: F.mse_loss(at_scale(p), at_scale(h)) / 2 + 0.3 * (p**2).mean()),
    "variance": (
        {"weight": 0.0, "variance_reg": 2.0},
        lambda p, h: 2 * (std(at_scale(p)) - std(at_scale(h))).square().mean(),
    ),
    "all": (
        {"kind": "cosine", "l2_reg": 0.1, "variance_reg": 0.6},
        lambda p, h: (
            (1 - F.cosine_similarity(p, h)).mean()
            + 0.1 * (p**2).mean()
            + 0.6 * (std(at_scale(p)) - std(at_scale(h))).square().mean()
        ),
    ),
}


@pytest.mark.parametrize("micro", [1, 2, N])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_torch_on_the_whole_batch(
    directory: Path, world: World, batch: Batch, case: str, micro: int
) -> None:
    options, expected = CASES[case]
    made = module(directory, world, micro)
    assert batch.vectors is not None
    targets = torch.from_numpy(batch.vectors(range(N)))
    value = expected(predictions(made, batch, 4), targets)
    parameters = list(made.model.parameters())
    wanted = torch.autograd.grad(value, parameters, allow_unused=True)
    done = make_reconstruction_loss(ArLossConfig(**options)).update(made, batch, 4)
    assert done.statistics["loss"] == pytest.approx(value.item(), rel=2e-5)
    largest = max(float(one.abs().max()) for one in wanted if one is not None)
    for one, found in zip(wanted, gradients(made).values(), strict=True):
        if one is not None:
            assert float((one - found).abs().max()) <= 2e-5 * largest


def test_the_default_is_the_contracts_error(directory: Path, world: World, batch: Batch) -> None:
    configured = make_reconstruction_loss(ArLossConfig()).update(module(directory, world, 2), batch, 0)
    plain = module(directory, world, 2).update(batch, reconstruction(N), ("loss",), 0)
    assert configured.statistics["loss"] == configured.statistics["mse"] == plain.statistics["loss"]
    assert configured.grad_norm == plain.grad_norm


@pytest.mark.parametrize("options", [{"kind": "cosine"}, {"kind": "smooth_l1", "weight": 7.0, "l2_reg": 1.0}])
def test_scores_are_the_contracts_error_whatever_is_trained_on(
    directory: Path, world: World, batch: Batch, options: dict[str, Any]
) -> None:
    made = module(directory, world, 2)
    assert batch.vectors is not None
    made.model.eval()
    with torch.no_grad():
        predicted = predictions_without_dropout(made, batch)
    expected = geometry.row_mse(predicted, torch.from_numpy(batch.vectors(range(N))))
    make_reconstruction_loss(ArLossConfig(**options)).update(made, batch, 0)
    torch.testing.assert_close(made.rows(batch, squared_error), expected, atol=1e-5, rtol=1e-5)


def predictions_without_dropout(made: TrainModule, batch: Batch) -> Tensor:
    [part] = microbatches(batch, made.world, N)
    return torch.empty(N, D).index_copy(0, part.rows, made.model(part))


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"kind": "huber"}, "ar_loss.kind='huber'"),
        ({"l2_reg": -1.0}, "ar_loss.l2_reg=-1.0"),
        ({"variance_reg": float("nan")}, "ar_loss.variance_reg=nan"),
        ({"smooth_l1_beta": 0.0}, "ar_loss.smooth_l1_beta=0.0"),
    ],
)
def test_a_loss_that_cannot_be_meant_is_refused(options: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ArLossConfig(**options)
    assert caught.value.found == found
