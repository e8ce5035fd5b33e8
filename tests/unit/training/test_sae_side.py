"""The side of the task sae without a sampler: what requests and batches carry, what KL compares with, what MSE fits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nla_megatron.config.schema import AlgorithmConfig, OptimConfig, RlConfig, TaskConfig
from nla_megatron.models.logprobs import response_logprobs
from nla_megatron.models.strength_files import read_description, read_predictor
from nla_megatron.parallel.world import World
from nla_megatron.tasks.steering import steered_tokens
from nla_megatron.training.losses import cross_entropy
from nla_megatron.training.module import TrainModule
from nla_megatron.training.sides.plain import PlainSide
from nla_megatron.training.sides.sae import SaeSide
from nla_megatron.training.steering import fit
from nla_megatron.types import InjectionCount, Rollout, RolloutBatch
from tests.support.hooked import Hooked, write_sae
from tests.support.tiny import SHAPE, tiny_model

STEPS = 40


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("side")
    tiny_model(folder / "model")
    write_sae(folder / "sae", SHAPE.hidden_size)
    prompts = [{"prompt": f"Document {number} tells"} for number in range(12)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    rows = [{**row, "target_strengths": [1.5 - number / 4, -1.0]} for number, row in enumerate(prompts)]
    (folder / "targets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config_of(files: Path, algorithm: AlgorithmConfig | None = None, **options: Any) -> RlConfig:
    places = [
        {"layer": 1, "sae": str(files / "sae"), "features": [3]},
        {"layer": 2, "mode": "global", "where": "all", "sae": str(files / "sae")},
    ]
    predictor = {"hidden": 64, "dropout": 0.2}
    return RlConfig(
        out=str(files / "run"), model=str(files / "model"), data=str(files / "prompts.jsonl"), steps=STEPS,
        task=TaskConfig("sae", {"interventions": places, "predictor": predictor, **options}), batch_size=4,
        optim=OptimConfig(lr=3e-3, warmup_steps=0, schedule="constant"), algorithm=algorithm or AlgorithmConfig(),
    )  # fmt: skip


def rollouts_of(side: SaeSide) -> tuple[Rollout, ...]:
    responses = ((5, 9, 11), (7,), (30, 31))
    return tuple(
        Rollout(row, 0, row, side.task.prompt_ids(row), ids, (0.0,) * len(ids), "", True)
        for row, ids in enumerate(responses)
    )


def test_requests_carry_the_strengths_that_the_trainer_will_steer_with(files: Path, world: World) -> None:
    side = SaeSide(config_of(files), world)
    requests = side.requests([3, 0, 3], 5)
    chosen = side.policy.strengths([request.prompt_ids for request in requests], 5)
    for request, row in zip(requests, chosen.tolist(), strict=True):
        assert request.strengths == ((row[0],), (row[1],)) and request.position is None
    assert requests[0].strengths == requests[2].strengths != requests[1].strengths
    # A further round of the same step asks for the prompts of a step beyond the end, steered as this step is.
    again, later = side.requests([3], 5 + STEPS)[0].strengths, side.requests([3], 6)[0].strengths
    assert again is not None and later is not None and requests[0].strengths is not None
    assert again[0] == pytest.approx(requests[0].strengths[0], rel=1e-5)
    assert later[0] != pytest.approx(requests[0].strengths[0], rel=1e-2)


def test_batches_steer_nobody_but_the_policy(files: Path, world: World) -> None:
    side = SaeSide(config_of(files), world)
    rollouts = rollouts_of(side)
    batch = side.batch(rollouts, 2, {})
    assert batch.only == [(), (), ()] and batch.training_step == 2
    collect, width = response_logprobs(1.0), batch.longest
    steered = side.policy.rows(batch, collect, width)
    with side.make_reference().in_place():
        plain = side.policy.rows(batch, collect, width)
    reference = Hooked(files / "model")
    for row, rollout in enumerate(rollouts):
        wanted = reference.logprobs(rollout.prompt_ids, rollout.response_ids, [])
        first = len(rollout.prompt_ids) - 1
        assert torch.allclose(plain[row, first : first + len(wanted)], wanted, atol=2e-5)
    assert float((steered - plain).abs().max()) > 1e-3


@pytest.mark.parametrize("reference", ["initial", "ema"])
def test_kl_may_compare_with_the_predictor_as_it_began_or_its_average(
    files: Path, world: World, reference: str
) -> None:
    algorithm = AlgorithmConfig(reference=reference, reference_decay=0.75)
    side = SaeSide(config_of(files, algorithm, reference="predictor"), world)
    batch = side.batch(rollouts_of(side), 2, {})
    collect, width, kept = response_logprobs(1.0), batch.longest, side.make_reference()
    start = {name: values.clone() for name, values in side.policy.predictor.state_dict().items()}
    began = side.policy.rows(batch, collect, width)
    side.policy.update(batch, cross_entropy(float(batch.fields["mask"].sum())), ("loss",), 0)
    end = {name: values.clone() for name, values in side.policy.predictor.state_dict().items()}
    kept.follow()
    with kept.in_place():
        inside = side.policy.predictor.state_dict()
        share = 0.25 if reference == "ema" else 0.0
        for name, values in inside.items():
            assert torch.allclose(values, start[name] + share * (end[name] - start[name]), atol=1e-6)
        found = side.policy.rows(batch, collect, width)
    after = side.policy.rows(batch, collect, width)
    assert all(torch.equal(values, end[name]) for name, values in side.policy.predictor.state_dict().items())
    assert not torch.equal(after, began) and torch.equal(found, began) == (reference == "initial")


def test_without_steering_the_model_itself_learns_on_the_same_prompts(files: Path, world: World) -> None:
    config = config_of(files, steering=False, interventions=[])
    assert SaeSide.check(config, 1) == SaeSide.check(config_of(files), 1)
    side, steered = SaeSide(config, world), SaeSide(config_of(files), world)
    assert type(side) is PlainSide and isinstance(side.policy, TrainModule) and side.interventions == ()
    assert [request.strengths for request in side.requests([0, 1], 0)] == [None, None]
    assert [each.prompt_ids for each in side.requests([0, 1], 0)] == [
        each.prompt_ids for each in steered.requests([0, 1], 0)
    ]
    assert steered.model is None, "the sampler's weights never change"


def test_what_is_logged_of_strengths_and_steered_tokens(files: Path, world: World) -> None:
    side = SaeSide(config_of(files), world)
    batch = RolloutBatch(rollouts_of(side), InjectionCount(3, 3))
    scalars = side.learn(batch, side.measure(batch, 1), 1)
    chosen = side.policy.strengths([side.task.prompt_ids(row) for row in range(3)], 1)
    assert scalars["strength_mean/block1_feature3"] == pytest.approx(float(chosen[:, 0].mean()))
    assert scalars["strength_max/block2_global"] == pytest.approx(float(chosen[:, 1].max()))
    assert scalars["strength_std"] == pytest.approx(float(chosen.std(correction=0)))
    # Generated tokens as inputs are 2 + 0 + 1; all tokens as inputs are those and the prompts'.
    prompts = sum(len(side.task.prompt_ids(row)) for row in range(3))
    assert scalars["steered_tokens"] == steered_tokens(side.interventions, batch.rollouts) == 3 + 3 + prompts
    assert scalars["steering_failed"] == 0


def test_the_exported_predictor_tells_how_long_an_epoch_was(files: Path, world: World, tmp_path: Path) -> None:
    side = SaeSide(replace(config_of(files), out=str(tmp_path)), world)
    side.export()
    # A tenth of the 12 prompts is held out.
    assert read_description(tmp_path / "predictor").training["steps_per_epoch"] == 11 / 4


def test_mse_fits_target_strengths_without_sampling(files: Path, world: World) -> None:
    config = replace(
        config_of(files, objective="mse", predictor={"hidden": 64, "dropout": 0.0}), out=str(files / "fitted"),
        data=str(files / "targets.jsonl"), held_out=str(files / "targets.jsonl"), eval_every=STEPS, batch_size=12,
    )  # fmt: skip
    SaeSide.check(config, 1)
    fit(config, world)
    logged = [json.loads(line) for line in next((files / "fitted").rglob("*.jsonl")).read_text().splitlines()]
    assert logged[-1]["eval_mse"] < 0.1 * logged[0]["loss"]
    predictor, described = read_predictor(files / "fitted" / "predictor")
    assert [each.layer for each in described.interventions] == [1, 2]
    begun = {**config.task.options, "objective": "rl", "predictor": {"path": str(files / "fitted" / "predictor")}}
    start = replace(
        config, task=TaskConfig("sae", begun), data=str(files / "prompts.jsonl"), held_out=None, eval_every=0
    )
    SaeSide.check(start, 1)
    side = SaeSide(start, world)
    prompts = [side.task.prompt_ids(row) for row in range(3)]
    assert torch.equal(side.policy.strengths(prompts, None), predictor(side.policy.features(prompts)).detach())


def test_the_gradient_of_mse_is_that_of_autograd(files: Path, world: World) -> None:
    side = SaeSide(config_of(files), world)
    prompts = [side.task.prompt_ids(row) for row in range(4)]
    targets = torch.tensor([[1.0, 2.0], [0.0, -1.0], [0.5, 0.5], [2.0, 1.0]])
    policy = replaced_rate(side.policy)
    policy.predictor.zero_grad()
    wanted = torch.nn.functional.mse_loss(policy._predict(prompts, 3), targets)
    wanted.backward()
    gradients = {name: each.grad.clone() for name, each in policy.predictor.named_parameters() if each.grad is not None}
    done = policy.fit(prompts, targets, 3)
    assert done.statistics["loss"] == pytest.approx(float(wanted.detach()), rel=1e-6)
    for name, each in policy.predictor.named_parameters():
        assert each.grad is not None and torch.allclose(each.grad, gradients[name], rtol=1e-5, atol=1e-8)


def replaced_rate(policy: Any) -> Any:
    """Without clipping, which would scale the gradients in place."""
    policy.config = replace(policy.config, clip_grad=0.0)
    return policy
