"""The strength predictor: its formula, its range, its dropout, its files, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nla_megatron.errors import CheckpointError, ConfigError, MissingFile, NlaError, WidthError
from nla_megatron.interventions.schedules import Schedule
from nla_megatron.interventions.spec import Intervention
from nla_megatron.models.strength import PredictorConfig, StrengthPredictor, columns_of, dropout_seed, pooled
from nla_megatron.models.strength_files import DESCRIPTION, WEIGHTS, read_predictor, write_predictor
from nla_megatron.types import Microbatch
from tests.support.worlds import world_of


def test_strengths_are_the_squashed_mlp_by_hand() -> None:
    form = PredictorConfig(hidden=2, activation="tanh", least=-1.0, most=3.0, scale=0.5)
    predictor = StrengthPredictor(2, 1, form).eval()
    with torch.no_grad():
        predictor.linears[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        predictor.linears[0].bias.copy_(torch.tensor([0.0, 1.0]))
        predictor.linears[1].weight.copy_(torch.tensor([[1.0, -1.0]]))
        predictor.linears[1].bias.copy_(torch.tensor([0.25]))
    x = math.tanh(0.5) - math.tanh(2 * -0.5 + 1) + 0.25
    assert float(predictor(torch.tensor([[0.5, -0.5]]))) == pytest.approx(0.5 * (math.tanh(x) * 2 + 1), rel=1e-6)


def test_the_default_form_is_two_layers_1024_wide_with_a_range_of_5_either_way() -> None:
    predictor = StrengthPredictor(8, 3, PredictorConfig())
    assert [tuple(each.weight.shape) for each in predictor.linears] == [(1024, 8), (3, 1024)]  # type: ignore[union-attr]
    extreme = predictor(torch.randn(64, 8) * 1e4)
    assert -5 <= float(extreme.min()) < -4.9 and 4.9 < float(extreme.max()) <= 5


@pytest.mark.parametrize("initial", [0.0, 1.0, -3.5])
def test_an_untrained_predictor_says_the_initial_strength_where_features_are_zero(initial: float) -> None:
    form = PredictorConfig(hidden=4, layers=1, scale=1.5, initial=initial)
    assert torch.allclose(StrengthPredictor(3, 2, form)(torch.zeros(1, 3)), torch.full((1, 2), initial), atol=1e-5)


def test_a_seed_is_a_predictor_whatever_was_drawn_before() -> None:
    first = StrengthPredictor(4, 2, PredictorConfig(), seed=7).state_dict()
    state = torch.get_rng_state()
    torch.randn(9)
    again = StrengthPredictor(4, 2, PredictorConfig(), seed=7).state_dict()
    other = StrengthPredictor(4, 2, PredictorConfig(), seed=8).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["linears.0.weight"], other["linears.0.weight"])
    torch.set_rng_state(state)


def test_dropout_of_a_row_depends_on_its_seed_and_not_on_the_batch() -> None:
    predictor = StrengthPredictor(4, 2, PredictorConfig(hidden=200, dropout=0.25))
    features = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    together = predictor(features, [5, 6, 7])
    assert torch.allclose(predictor(features[[2, 0]], [7, 5]), together[[2, 0]], atol=1e-6)
    assert not torch.allclose(predictor(features, [8, 6, 7])[0], together[0])
    assert torch.equal(predictor(features), StrengthPredictor.forward(predictor.eval(), features))


def test_dropout_keeps_the_mean_and_drops_its_share() -> None:
    predictor = StrengthPredictor(1, 1, PredictorConfig(hidden=20_000, dropout=0.25, activation="relu"))
    dropped = predictor._dropped(torch.ones(1, 20_000), [3], 0)
    assert float((dropped == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.015)


def test_seeds_of_dropout_differ_by_run_step_and_prompt() -> None:
    seeds = {dropout_seed(*each) for each in ((0, 0, (1, 2)), (1, 0, (1, 2)), (0, 1, (1, 2)), (0, 0, (1, 3)))}
    assert len(seeds) == 4 and dropout_seed(0, 0, (1, 2)) == dropout_seed(0, 0, [1, 2])


def test_columns_follow_the_interventions_and_leave_vectors_out() -> None:
    wanted = (
        Intervention(0, "features", sae="s", features=(1, 2)), Intervention(1, "norm_add"),
        Intervention(2, "global", sae="s"),
    )  # fmt: skip
    assert columns_of(wanted) == ((0, 2), None, (2, 3))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"least": 5.0, "most": -5.0}, "strengths from 5.0 to -5.0"),
        ({"least": 1.0, "most": 1.0}, "strengths from 1.0 to 1.0"),
        ({"most": math.inf}, "strengths from -5.0 to inf"),
        ({"scale": 0.0}, "strength_scale=0.0"),
        ({"hidden": 0}, "0 wide"),
        ({"layers": 0}, "0 layers"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"activation": "swish"}, "activation='swish'"),
        ({"initial": 5.0}, "initial_strength=5.0"),
        ({"initial": 9.0, "scale": -1.0}, "initial_strength=9.0"),
    ],
)
def test_forms_that_cannot_be_meant_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        PredictorConfig(**options)


def test_features_of_another_model_are_named() -> None:
    with pytest.raises(WidthError, match="features 7 wide"):
        StrengthPredictor(8, 1, PredictorConfig())(torch.zeros(1, 7))


STEERS = (
    Intervention(
        2, "clamp", "generated", 0.5, Schedule("linear", "decode", 1, 0, 4), sae="s", features=(3,), max_acts=(2.0,)
    ),
    Intervention("embedding", "global", "all", sae="s"),
)


def exported(folder: Path) -> StrengthPredictor:
    predictor = StrengthPredictor(6, 2, PredictorConfig(hidden=5, activation="gelu", initial=1.0), seed=3)
    write_predictor(folder, predictor, STEERS, "models/base", {"steps": 4})
    return predictor


def test_an_exported_predictor_comes_back_with_what_it_steers(tmp_path: Path) -> None:
    predictor = exported(tmp_path)
    again, described = read_predictor(tmp_path)
    features = torch.randn(4, 6)
    assert torch.equal(again(features), predictor(features))
    assert described.interventions == STEERS and described.base_model == "models/base"
    assert sorted(path.name for path in tmp_path.iterdir()) == [DESCRIPTION, WEIGHTS]


@pytest.mark.parametrize(
    ("damage", "error", "said"),
    [
        (lambda folder: (folder / DESCRIPTION).unlink(), MissingFile, f"no .*{DESCRIPTION}"),
        (lambda folder: (folder / WEIGHTS).unlink(), MissingFile, f"no .*{WEIGHTS}"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"short"), CheckpointError, WEIGHTS),
        (lambda folder: (folder / DESCRIPTION).write_text("{}"), CheckpointError, DESCRIPTION),
        (lambda folder: changed(folder, "width", 7), CheckpointError, "tensors"),
        (lambda folder: changed(folder, "format", 2), CheckpointError, "format 2"),
        (lambda folder: broken(folder), CheckpointError, "not finite"),
    ],
)
def test_damaged_exports_are_named(tmp_path: Path, damage: Any, error: type[NlaError], said: str) -> None:
    exported(tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=said):
        read_predictor(tmp_path)


def broken(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({name: torch.full_like(values, torch.nan) for name, values in tensors.items()}, folder / WEIGHTS)


def changed(folder: Path, key: str, value: Any) -> None:
    values = json.loads((folder / DESCRIPTION).read_text())
    (folder / DESCRIPTION).write_text(json.dumps({**values, key: value}))


def test_features_are_the_mean_over_a_prompts_own_tokens() -> None:
    states_TBD = torch.tensor([[[1.0, 2.0], [4.0, 0.0]], [[3.0, 6.0], [9.0, 9.0]], [[2.0, 1.0], [9.0, 9.0]]])
    lengths = torch.tensor([3, 1])
    part = Microbatch(torch.zeros(2, 3, dtype=torch.long), lengths, torch.ones(2), torch.arange(2))
    assert torch.equal(pooled(world_of())(states_TBD, part), torch.tensor([[2.0, 3.0], [4.0, 0.0]]))
