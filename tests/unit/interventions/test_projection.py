"""The learned map of the vectors. Legend: N vectors, E wide before, D after."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nla_megatron.errors import CheckpointError, ConfigError, MissingFile, WidthError
from nla_megatron.interventions.projection import Projection


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
    projection = Projection(6, 4, layers=2, dropout=0.5)
    vectors_NE = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    projection.eval()
    assert torch.equal(projection(vectors_NE), projection(vectors_NE))
    projection.train()
    assert not torch.equal(projection(vectors_NE), projection(vectors_NE))
    projection(vectors_NE).square().sum().backward()
    assert all(bool(parameter.grad.abs().sum() > 0) for parameter in projection.parameters())


@pytest.mark.parametrize(("widths", "layers"), [((5, 5), 1), ((6, 4), 3)])
def test_what_is_saved_is_loaded(tmp_path: Path, widths: tuple[int, int], layers: int) -> None:
    projection = Projection(*widths, layers, seed=4)
    for parameter in projection.parameters():
        parameter.data += 0.25
    projection.save(tmp_path / "projection.safetensors")
    again = Projection.load(tmp_path / "projection.safetensors", *widths)
    vectors_NE = torch.randn(3, widths[0], generator=torch.Generator().manual_seed(1))
    assert torch.equal(again(vectors_NE), projection(vectors_NE))


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = tmp_path / "projection.safetensors"
    with pytest.raises(MissingFile, match="projection.safetensors"):
        Projection.load(path, 6, 4)
    path.write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="a safetensors file"):
        Projection.load(path, 6, 4)
    Projection(6, 4, 2).save(path)
    with pytest.raises(WidthError, match="from 6 to 4 in .* from 6 to 5|from 6 to 4"):
        Projection.load(path, 6, 5)
    state = load_file(path)
    save_file({name: values for name, values in state.items() if name != "norms.0.bias"}, path)
    with pytest.raises(CheckpointError, match="norms.0.bias"):
        Projection.load(path, 6, 4)
    save_file({"weight": torch.zeros(2, 2)}, path)
    with pytest.raises(CheckpointError, match="parameters of a projection"):
        Projection.load(path, 6, 4)


@pytest.mark.parametrize("wrong", [(0, 4, 1, 0.0), (4, 0, 1, 0.0), (4, 4, 0, 0.0), (4, 4, 1, 1.0)])
def test_a_projection_that_cannot_be_is_refused(wrong: tuple[int, int, int, float]) -> None:
    with pytest.raises(ConfigError, match="positive widths"):
        Projection(*wrong)
