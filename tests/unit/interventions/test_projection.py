"""The learned map of the vectors. Legend: N vectors, E wide before, D after."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from nla_megatron.errors import ConfigError
from nla_megatron.interventions.projection import Projection, projector


def test_one_square_layer_starts_as_the_identity_and_draws_nothing() -> None:
    vectors_ND = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    assert torch.equal(Projection(5, 5)(vectors_ND), vectors_ND)
    Projection(5, 7, layers=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_other_shapes_start_orthogonal_from_the_seed_alone() -> None:
    one, same, other = (Projection(6, 4, seed=seed).linears[0].weight for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    torch.testing.assert_close(one @ one.T, torch.eye(4))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_layers_are_linear_norm_relu_and_a_last_linear(layers: int) -> None:
    """By the layers' formulas in fp64; bf16 vectors too, computed in fp32."""
    generator = torch.Generator().manual_seed(layers)
    projection = Projection(6, 4, layers)
    for parameter in projection.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    vectors_NE = torch.randn(3, 6, generator=generator).bfloat16()
    values, state = vectors_NE.double(), {name: v.double() for name, v in projection.state_dict().items()}
    for index in range(layers):
        values = values @ state[f"linears.{index}.weight"].T + state[f"linears.{index}.bias"]
        if index < layers - 1:
            centred = values - values.mean(-1, keepdim=True)
            values = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            values = (values * state[f"norms.{index}.weight"] + state[f"norms.{index}.bias"]).clamp_min(0)
    out_ND = projection(vectors_NE)
    assert out_ND.dtype == torch.float32 and len(state) == 2 * layers + 2 * (layers - 1)
    torch.testing.assert_close(out_ND.double(), values, rtol=1e-5, atol=1e-5)


def test_gradients_reach_every_parameter_and_dropout_only_trains() -> None:
    projection, seen = Projection(6, 4, layers=3), []
    vectors_NE = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))

    def drop(values_ND: Tensor, layer: int) -> Tensor:
        seen.append(layer)
        return values_ND * 2

    projection.eval()
    assert torch.equal(projection(vectors_NE, drop), projection(vectors_NE)) and seen == []
    projection.train()
    assert not torch.equal(projection(vectors_NE, drop), projection(vectors_NE)) and seen == [0, 1]
    projection(vectors_NE).square().sum().backward()
    assert all(bool(parameter.grad.abs().sum() > 0) for parameter in projection.parameters())


def test_an_engine_maps_with_the_projection_of_the_intervention() -> None:
    projections = {0: Projection(6, 4, seed=1), 2: Projection(6, 4, 2, seed=2)}
    vectors_NE = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    project = projector(projections)
    for number, projection in projections.items():
        mapped = project(number, vectors_NE.numpy())
        assert mapped.dtype == np.float32
        np.testing.assert_array_equal(mapped, projection(vectors_NE).detach().numpy())


@pytest.mark.parametrize("wrong", [(0, 4, 1), (4, 0, 1), (4, 4, 0)])
def test_a_projection_that_cannot_be_is_refused(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="positive widths"):
        Projection(*wrong)
