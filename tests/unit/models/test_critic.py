"""A critic starts at zero, reads the policy's blocks, and comes back from a checkpoint. Layouts: `test_layouts`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nla_megatron.config.schema import OptimConfig
from nla_megatron.conversion.hf import read_shape
from nla_megatron.conversion.live import load_critic
from nla_megatron.errors import CheckpointError
from nla_megatron.models.critic import response_values
from nla_megatron.parallel.world import World
from nla_megatron.training.checkpoint import Checkpoints
from nla_megatron.training.module import TrainModule
from tests.support.responses import responses
from tests.support.sampled import made, sampled

OPTIM = OptimConfig(lr=1e-2, warmup_steps=0, schedule="constant")


def module_of(directory: Path, world: World) -> TrainModule:
    return TrainModule(
        load_critic(str(directory), read_shape(directory), world, "float32"), world, OPTIM, 10, 2, "float32"
    )


def values(module: TrainModule) -> torch.Tensor:
    return module.rows(responses(), response_values, 5)


def test_a_critic_starts_at_zero_and_learns_values_where_a_response_is_predicted(world: World, directory: Path) -> None:
    module = module_of(directory, world)
    assert float(values(module).abs().max()) == 0
    for step in range(30):
        module.update(responses(), lambda v, part: (((v - 2) ** 2 * part.fields["mask"]).sum(), {}), (), step)
    found = values(module)
    assert (found != 0).tolist() == [[False, False, True, True, False], [False, False, True, False, False]]
    assert float((found[found != 0] - 2).abs().max()) < 0.2


def test_a_critic_comes_back_from_a_checkpoint(world: World, directory: Path, tmp_path: Path) -> None:
    module, checkpoints = module_of(directory, world), Checkpoints(tmp_path, "rl", world, 1)
    for step in range(2):
        module.update(responses(), lambda v, part: (((v - 2) ** 2 * part.fields["mask"]).sum(), {}), (), step)
    checkpoints.save(2, {"critic": module}, {}, {})
    fresh = module_of(directory, world)
    assert checkpoints.resume({"critic": fresh}, {}, {}) == 2
    assert torch.equal(values(fresh), values(module))


def test_torchs_generator_goes_on_where_it_was(world: World, directory: Path, tmp_path: Path) -> None:
    module, checkpoints = module_of(directory, world), Checkpoints(tmp_path, "rl", world, 1)
    checkpoints.save(1, {"critic": module}, {}, {})
    drawn = torch.rand(3)
    checkpoints.resume({"critic": module}, {}, {})
    assert torch.equal(torch.rand(3), drawn)


def test_an_algorithms_moving_average_comes_back_from_a_checkpoint(
    world: World, directory: Path, tmp_path: Path
) -> None:
    module, checkpoints = module_of(directory, world), Checkpoints(tmp_path, "rl", world, 1)
    before, after = made("reinforce", baseline="ema"), made("reinforce", baseline="ema")
    for rewards in ([0.1, 0.7], [0.3, 1 / 3]):
        before.credit(sampled(rewards, [0, 1]))
    checkpoints.save(2, {"critic": module}, {}, {"algorithm": before})
    checkpoints.resume({"critic": module}, {}, {"algorithm": after})
    assert after.state() == before.state() != {}


def test_a_checkpoint_without_what_is_carried_from_step_to_step_is_refused(
    world: World, directory: Path, tmp_path: Path
) -> None:
    module, checkpoints = module_of(directory, world), Checkpoints(tmp_path, "rl", world, 1)
    checkpoints.save(1, {"critic": module}, {}, {})
    with pytest.raises(CheckpointError, match=r"memory=\[\][\s\S]*memory=\['algorithm'\]"):
        checkpoints.resume({"critic": module}, {}, {"algorithm": made("reinforce", baseline="ema")})


def test_a_policy_of_another_shape_is_refused(world: World, directory: Path) -> None:
    other = read_shape(directory).__class__(**{**vars(read_shape(directory)), "ffn_hidden_size": 128})
    with pytest.raises(CheckpointError, match="mlp"):
        load_critic(str(directory), other, world, "float32")
