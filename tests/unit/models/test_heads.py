"""How an AR makes one vector of its stream, against transformers' hidden states and torch's own layers.

Legend: B rows, T tokens, D hidden.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel

from nla_megatron.contract.blocks import ReconstructorSpec
from nla_megatron.conversion.hf import read_shape
from nla_megatron.conversion.live import load_reconstructor
from nla_megatron.models.batching import Batch, microbatches
from nla_megatron.models.heads import ReconstructionHead, head_shapes
from nla_megatron.models.pipeline import forward_each
from nla_megatron.models.reconstructor import Reconstructor
from nla_megatron.parallel.world import World
from nla_megatron.types import POOLINGS, Microbatch
from tests.support.tiny import SHAPE, tiny_model

LENGTHS = (9, 4, 1, 12, 7)
D = SHAPE.hidden_size


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def ids() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(3, SHAPE.vocab_size, length).tolist() for length in LENGTHS]


def build(directory: Path, world: World, spec: ReconstructorSpec, seed: int = 0) -> Reconstructor:
    assert spec.layer is not None
    shape = read_shape(directory).truncated(spec.layer + 1)
    return load_reconstructor(str(directory), shape, world, "float32", spec, seed)


def predicted(
    model: Any, ids: list[list[int]], world: World, micro: int = 2, step: int = 0, training: bool = False
) -> Tensor:
    """(B, D) in the order of the rows."""
    out = torch.zeros(len(ids), D)

    def visit(output_BD: Tensor, part: Microbatch) -> None:
        for vector, row, weight in zip(output_BD, part.rows.tolist(), part.weights.tolist(), strict=True):
            if weight:
                out[row] = vector

    forward_each(model, microbatches(Batch(ids=ids, training_step=step), world, micro), world, visit, training)
    return out


@torch.no_grad()
def streams(directory: Path, ids: list[list[int]], layer: int) -> list[Tensor]:
    """Of each row alone, (T, D), by transformers."""
    model = AutoModel.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    return [model(torch.tensor([row]), output_hidden_states=True).hidden_states[layer + 1][0] for row in ids]


def by_hand(stream_TD: Tensor, pooling: str, logits: Tensor) -> Tensor:
    if pooling == "weighted":
        scores = logits[: len(stream_TD)].exp()
        return (
            sum((score * token for score, token in zip(scores, stream_TD, strict=True)), torch.zeros(D)) / scores.sum()
        )
    found = {
        "last": lambda: stream_TD[-1],
        "cls": lambda: stream_TD[0],
        "mean": lambda: torch.stack(list(stream_TD)).mean(0),
        "max": lambda: torch.tensor(np.maximum.reduce(stream_TD.numpy(), axis=0)),
    }
    return found[pooling]()


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_is_over_the_real_tokens_of_transformers_hidden_states(
    directory: Path, ids: list[list[int]], world: World, pooling: str, layer: int
) -> None:
    model = build(directory, world, ReconstructorSpec(pooling, layer=layer))
    logits = torch.randn(SHAPE.max_positions, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(D, D, generator=torch.Generator().manual_seed(2)) / D**0.5
    assert model.value_head is not None
    with torch.no_grad():
        model.value_head.weight.copy_(weight)
        if pooling == "weighted":
            model.value_head.position_logits.copy_(logits)
    rows = [by_hand(stream_TD, pooling, logits) @ weight.T for stream_TD in streams(directory, ids, layer)]
    for micro in (1, 5):
        torch.testing.assert_close(predicted(model, ids, world, micro), torch.stack(rows), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_every_depth_starts_as_the_identity_on_directions(
    directory: Path, ids: list[list[int]], world: World, layers: int
) -> None:
    found = predicted(build(directory, world, ReconstructorSpec(projection_layers=layers, layer=2)), ids, world)
    expected = torch.stack([stream_TD[-1] for stream_TD in streams(directory, ids, 2)])
    cosine = torch.nn.functional.cosine_similarity(found, expected)
    assert float((1 - cosine).abs().max()) <= 1e-5


def test_a_deep_head_is_linear_layernorm_relu_and_a_last_linear(
    directory: Path, ids: list[list[int]], world: World
) -> None:
    model = build(directory, world, ReconstructorSpec("mean", 3, layer=1))
    assert model.value_head is not None
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.value_head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    names = model.value_head.state_dict()
    stack: list[nn.Module] = []
    for number, wide in ((0, D), (1, 2 * D)):
        linear, norm = nn.Linear(wide, 2 * D), nn.LayerNorm(2 * D)
        linear.load_state_dict({key: names[f"hidden.{number}.linear.{key}"] for key in ("weight", "bias")})
        norm.load_state_dict({key: names[f"hidden.{number}.norm.{key}"] for key in ("weight", "bias")})
        stack += [linear, norm, nn.ReLU()]
    last = nn.Linear(2 * D, D, bias=False)
    last.load_state_dict({"weight": names["weight"]})
    with torch.no_grad():
        expected = nn.Sequential(*stack, last)(torch.stack([s.mean(0) for s in streams(directory, ids, 1)]))
    torch.testing.assert_close(predicted(model, ids, world), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("layers", [1, 2])
def test_dropout_is_a_function_of_seed_step_and_row_and_absent_from_evaluation(
    directory: Path, ids: list[list[int]], world: World, layers: int
) -> None:
    spec = ReconstructorSpec("mean", layers, dropout=0.5, layer=1)
    model = build(directory, world, spec, seed=7)
    plain = predicted(build(directory, world, replace(spec, dropout=0.0)), ids, world)
    torch.testing.assert_close(predicted(model, ids, world), plain)
    drawn = predicted(model, ids, world, micro=2, training=True)
    torch.testing.assert_close(predicted(model, ids, world, micro=5, training=True), drawn)
    torch.testing.assert_close(predicted(build(directory, world, spec, seed=7), ids, world, training=True), drawn)
    for other in (
        predicted(model, ids, world, step=1, training=True),
        predicted(build(directory, world, spec, seed=8), ids, world, training=True),
    ):
        assert not torch.allclose(other, drawn)
    rows = [tuple((vector == 0).tolist()) for vector in drawn]
    assert len(set(rows)) == len(rows), "every row drops other numbers"


def test_dropped_numbers_are_zero_and_the_others_scaled_up() -> None:
    head = ReconstructionHead(SHAPE, ReconstructorSpec(dropout=0.25)).train()
    ones_TBD = torch.ones(3, 400, D)
    part = Microbatch(torch.zeros(400, 3, dtype=torch.int64), torch.full((400,), 3), torch.ones(400), torch.arange(400))
    found = head(ones_TBD, part)
    assert found.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    share = float((found == 0).float().mean())
    assert abs(share - 0.25) <= 4 * (0.25 * 0.75 / found.numel()) ** 0.5


def test_the_tensors_of_a_head_are_known_without_making_it() -> None:
    shapes = head_shapes(SHAPE, ReconstructorSpec("weighted", 2))
    assert shapes["weight"] == (D, 2 * D) and shapes["position_logits"] == (SHAPE.max_positions,)
    assert shapes["hidden.0.linear.weight"] == (2 * D, D) and shapes["hidden.0.norm.bias"] == (2 * D,)
    assert head_shapes(SHAPE, ReconstructorSpec()) == {"weight": (D, D)}
