"""The policy that a KL is measured to: as it was, or a moving average; neither disturbs the policy that learns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nla_megatron.config.schema import AlgorithmConfig, LoraConfig, OptimConfig
from nla_megatron.conversion.hf import read_shape
from nla_megatron.conversion.live import load_from_hf
from nla_megatron.interventions.spec import Intervention
from nla_megatron.models.batching import Batch
from nla_megatron.models.interventions import intervene
from nla_megatron.models.logprobs import response_logprobs
from nla_megatron.models.projections import projections_of
from nla_megatron.models.verbalizer import build_verbalizer
from nla_megatron.parallel.world import World
from nla_megatron.training.checkpoint import Checkpoints
from nla_megatron.training.lora import adapt
from nla_megatron.training.losses import cross_entropy
from nla_megatron.training.module import TrainModule
from nla_megatron.training.reference import FrozenCopy, copied
from tests.support.responses import responses

VECTORS = np.random.default_rng(0).standard_normal((2, 64), dtype=np.float32)
DECAY = 0.75
OPTIM = OptimConfig(lr=1e-2, warmup_steps=0, schedule="constant")
POLICIES = pytest.mark.parametrize(("dtype", "rank"), [("float32", 0), ("bfloat16", 0), ("bfloat16", 2)])
"""A rank is that of adapters, which learn in place of the weights."""


def batch() -> Batch:
    return responses(positions=[1, 2], vectors=lambda rows: VECTORS[list(rows)])


class Learner:
    """A policy that learns its responses by heart, and what it is compared with."""

    def __init__(
        self, directory: Path, world: World, dtype: str, rank: int = 0, reference: str = "ema",
        interventions: Sequence[Intervention] = (),
    ):  # fmt: skip
        shape = read_shape(directory)
        self.model: Any = build_verbalizer(shape, world, dtype)
        load_from_hf(self.model, str(directory), shape, world, with_head=True)
        intervene(self.model, interventions)
        adapt(self.model, LoraConfig(rank=rank), world, seed=3)
        self.reference = copied(self.model, AlgorithmConfig(reference=reference, reference_decay=DECAY))
        self.module = TrainModule(self.model, world, OPTIM, 10, 2, dtype)

    def learn(self, steps: int) -> list[float]:
        """Norms of the gradients."""
        norms = []
        for step in range(steps):
            norms.append(self.module.update(batch(), cross_entropy(3.0), ("loss",), step).grad_norm)
            self.reference.follow()
        return norms

    def logprobs(self) -> torch.Tensor:
        return self.module.rows(batch(), response_logprobs(1.0), 5)

    def weights(self) -> list[torch.Tensor]:
        """Those that learn."""
        return [one.detach().float().clone() for one in self.model.parameters() if one.requires_grad]

    def average(self) -> list[torch.Tensor]:
        return [value.clone() for value in self.reference.kept]


@POLICIES
def test_inside_the_model_is_what_it_was_and_outside_what_it_became(
    world: World, directory: Path, dtype: str, rank: int
) -> None:
    learner = Learner(directory, world, dtype, rank, reference="initial")
    assert type(learner.reference) is FrozenCopy
    before = learner.logprobs()
    learner.learn(2)
    after = learner.logprobs()
    assert not torch.equal(before, after)
    with learner.reference.in_place():
        assert torch.equal(learner.logprobs(), before)
    assert torch.equal(learner.logprobs(), after)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_reference_has_the_projection_that_it_started_with(world: World, directory: Path, rank: int) -> None:
    places = (Intervention(1, "project", projection_layers=2),)
    learner = Learner(directory, world, "bfloat16", rank, "initial", places)
    before = learner.logprobs()
    with torch.no_grad():
        for parameter in projections_of(learner.model)[0].parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    after = learner.logprobs()
    assert not torch.equal(before, after)
    with learner.reference.in_place():
        assert torch.equal(learner.logprobs(), before)
    assert torch.equal(learner.logprobs(), after)


@POLICIES
def test_the_average_is_of_the_weights_after_each_update(world: World, directory: Path, dtype: str, rank: int) -> None:
    learner = Learner(directory, world, dtype, rank)
    expected = learner.weights()
    for _ in range(3):
        learner.learn(1)
        expected = [DECAY * one + (1 - DECAY) * new for one, new in zip(expected, learner.weights(), strict=True)]
    for found, wanted in zip(learner.average(), expected, strict=True):
        assert found.dtype == torch.float32 and torch.allclose(found, wanted, atol=1e-7, rtol=1e-6)


@POLICIES
def test_the_average_comes_back_from_a_checkpoint_to_the_bit(
    world: World, directory: Path, tmp_path: Path, dtype: str, rank: int
) -> None:
    learner, checkpoints = Learner(directory, world, dtype, rank), Checkpoints(tmp_path, "rl", world, 1)
    learner.learn(2)
    checkpoints.save(2, {"reference": learner.reference}, {}, {})
    kept, fresh = learner.average(), Learner(directory, world, dtype, rank)
    untouched = fresh.weights()
    checkpoints.resume({"reference": fresh.reference}, {}, {})
    assert all(torch.equal(one, other) for one, other in zip(fresh.average(), kept, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(fresh.weights(), untouched, strict=True))


@POLICIES
def test_a_policy_learns_on_after_its_average_was_saved(
    world: World, directory: Path, tmp_path: Path, dtype: str, rank: int
) -> None:
    """To the bit as if nothing had been saved, also where the average is of another type than the weights."""
    straight, saved = (Learner(directory, world, dtype, rank) for _ in range(2))
    straight.learn(2)
    saved.learn(2)
    Checkpoints(tmp_path, "rl", world, 1).save(2, {"reference": saved.reference}, {}, {})
    assert saved.learn(2) == straight.learn(2)
    assert all(torch.equal(one, other) for one, other in zip(saved.weights(), straight.weights(), strict=True))
