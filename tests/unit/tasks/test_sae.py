"""Options of the task sae, and everything that is refused by name before a run."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nla_megatron.config.compose import compose
from nla_megatron.config.schema import RlConfig, TaskConfig
from nla_megatron.contract.tokenizer import load_tokenizer
from nla_megatron.conversion.hf import read_shape
from nla_megatron.errors import ColumnError, ConfigError, LayoutError, MissingFile, NlaError, WidthError
from nla_megatron.interventions.spec import Intervention
from nla_megatron.models.strength import PredictorConfig, StrengthPredictor
from nla_megatron.models.strength_files import write_predictor
from nla_megatron.tasks.sae import predictor_config, sae_options
from nla_megatron.tasks.sae_rows import names_of, read_targets
from nla_megatron.training.sides.sae import SaeSide
from nla_megatron.training.steering import fit
from tests.support.hooked import write_sae
from tests.support.tiny import SHAPE, tiny_model

FEATURES = [3, 7]
TARGETS = [{"prompt": f"Document {number} tells", "target_strengths": [number / 4, -1.0]} for number in range(6)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's directory, SAEs, prompts, rows with targets, and exported predictors."""
    folder = tmp_path_factory.mktemp("sae")
    tiny_model(folder / "model")
    write_sae(folder / "sae", SHAPE.hidden_size)
    write_sae(folder / "narrow", 32)
    elsewhere = folder / "elsewhere"
    write_sae(elsewhere, SHAPE.hidden_size)
    config = json.loads((elsewhere / "cfg.json").read_text())
    (elsewhere / "cfg.json").write_text(json.dumps({**config, "hook_name": "blocks.2.hook_resid_post"}))
    lines(folder / "prompts.jsonl", [{"prompt": f"Document {number}"} for number in range(20)])
    lines(folder / "targets.jsonl", TARGETS)
    for name, width, strengths in (("wide", 80, 2), ("three", SHAPE.hidden_size, 3), ("fits", SHAPE.hidden_size, 2)):
        predictor = StrengthPredictor(width, strengths, PredictorConfig(hidden=4, least=-2, most=2))
        write_predictor(folder / name, predictor, (), "base", {})
    return folder


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The prompt as the tokenizer's own chat template writes it."""
    messages = [{"role": "user", "content": text}]
    written = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tuple(tokenizer(written, add_special_tokens=False)["input_ids"])


def config_of(files: Path, *, place: dict[str, Any] | None = None, **options: Any) -> RlConfig:
    """A run that is in order but for what is given; keys without a dot are the run's, `data` is one of them."""
    steering = {"layer": 1, "sae": str(files / "sae"), "features": FEATURES, **(place or {})}
    given = {"interventions": [{key: value for key, value in steering.items() if value is not None}]}
    run = {key: options.pop(key) for key in ("data", "model", "eval_every", "held_out") if key in options}
    base = RlConfig(
        out=str(files / "run"), model=str(files / "model"), data=str(files / "prompts.jsonl"),
        task=TaskConfig("sae", {**given, **options}),
    )  # fmt: skip
    return replace(base, **run)


def test_the_shipped_configuration_has_every_option_at_its_default() -> None:
    composed = compose("rl", ["task=sae", "out=x", "model=m"])
    shipped, bare = sae_options(composed.task), sae_options(TaskConfig("sae", {}))
    assert (shipped.objective, shipped.steering, shipped.reference) == (bare.objective, bare.steering, bare.reference)
    assert shipped.predictor_options == bare.predictor_options
    assert set(composed.task.options) == set(vars(bare))
    assert set(composed.task.options["predictor"]) == set(vars(bare.predictor_options))


def test_a_run_that_is_in_order_passes_and_knows_its_longest_prompt(files: Path) -> None:
    tokenizer = load_tokenizer(files / "model")
    longest = max(len(chat(tokenizer.fast, f"Document {number}")) for number in range(20))
    found = SaeSide.check(config_of(files), 1)
    assert found.longest == longest and 0 < found.rows < 20, "some are held out"


@pytest.mark.parametrize(
    ("place", "error", "said"),
    [
        ({"layer": 9}, ConfigError, "block 9 of a model with 4 blocks"),
        ({"sae": "narrow"}, WidthError, "narrow' is 32 wide"),
        ({"sae": "nowhere"}, MissingFile, "nowhere"),
        ({"sae": "elsewhere"}, ConfigError, "at layer 1"),
        ({"features": [3, 24]}, ConfigError, r"features \[24\]"),
        ({"features": [3, 3]}, ConfigError, r"features=\[3, 3\]"),
        ({"features": None}, ConfigError, "0 features with mode features"),
        ({"mode": "norm_add"}, ConfigError, r"interventions\[0\].mode='norm_add'"),
        ({"max_acts": [1.0]}, ConfigError, "1 max_acts for 2 features"),
        ({"strength": 0.0}, ConfigError, "strength=0"),
        ({"schedule": {"kind": "linear"}}, ConfigError, "schedule.steps=0"),
        ({"schedule": {"knd": "linear"}}, ConfigError, "schedule.knd"),
        ({"layers": 3}, ConfigError, r"interventions\[0\].layers"),
        ({"sae": None}, ConfigError, "either a path|sae=None"),
        ({"sae": None, "release": "a/b"}, ConfigError, "release='a/b'"),
        ({"sae": None, "release": "a/b", "sae_id": "c"}, MissingFile, "no SAE 'c' of release 'a/b'"),
    ],
)  # fmt: skip
def test_places_that_cannot_be_steered_are_named_before_the_run(
    files: Path, place: dict[str, Any], error: type[NlaError], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(files / "hub"))
    if place.get("sae"):
        place = {**place, "sae": str(files / place["sae"])}
    with pytest.raises(error, match=said):
        SaeSide.check(config_of(files, place=place), 1)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"interventions": []}, ConfigError, "no task.options.interventions"),
        ({"predictor": {"strength_min": 2.0, "strength_max": 1.0}}, ConfigError, "strengths from 2.0 to 1.0"),
        ({"predictor": {"activation": "silu"}}, ConfigError, "activation='silu'"),
        ({"predictor": {"hiden": 8}}, ConfigError, "task.options.predictor.hiden"),
        ({"predictor": {"path": "wide"}}, WidthError, "features 80 wide"),
        ({"predictor": {"path": "three"}}, WidthError, "makes 3 strengths"),
        ({"predictor": {"path": "none"}}, MissingFile, "predictor.json"),
        ({"predictor": {"path": "fits", "hidden": 8}}, ConfigError, "predictor.hidden beside predictor.path"),
        ({"objective": "sft"}, ConfigError, "objective='sft'"),
        ({"reference": "other"}, ConfigError, "reference='other'"),
        ({"objective": "mse", "steering": False}, ConfigError, "objective=mse with steering=false"),
        ({"objective": "mse", "data": ""}, ConfigError, "no data="),
        ({"objective": "mse"}, ColumnError, "target_strengths"),
        ({"objective": "mse", "data": "targets", "eval_every": 2}, ConfigError, "eval_every=2 without held_out"),
        ({"compare_samples": 0}, ConfigError, "compare_samples=0"),
        ({"prompts": {"name": "lexicl"}}, ConfigError, "task 'lexicl'"),
        ({"data": "nowhere"}, MissingFile, "nowhere"),
        ({"data": "empty"}, ColumnError, "no prompts"),
        ({"model": "nowhere"}, MissingFile, "config.json"),
        ({"eval_every": 5, "prompts": {"options": {"held_out_fraction": 0.0}}}, ConfigError, "without held-out rows"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_named_before_the_run(
    files: Path, options: dict[str, Any], error: type[NlaError], said: str
) -> None:
    (files / "empty").with_suffix(".jsonl").write_text("")
    options = {key: dict(value) if isinstance(value, dict) else value for key, value in options.items()}
    if "path" in options.get("predictor", {}):
        options["predictor"]["path"] = str(files / options["predictor"]["path"])
    if options.get("data"):
        options["data"] = str(files / f"{options['data']}.jsonl")
    if "model" in options:
        options["model"] = str(files / options["model"])
    with pytest.raises(error, match=said):
        SaeSide.check(config_of(files, **options), 1)


def test_a_layout_that_does_not_fit_is_named(files: Path) -> None:
    config = config_of(files)
    with pytest.raises(LayoutError, match="tp=3"):
        SaeSide.check(replace(config, parallel=replace(config.parallel, tp=3)), 3)


def test_an_exported_predictor_brings_its_own_form(files: Path) -> None:
    config = config_of(files, predictor={"path": str(files / "fits")})
    assert SaeSide.check(config, 1).rows > 0
    shape = read_shape(str(files / "model"))
    options = sae_options(config.task)
    assert predictor_config(options, options.steered(), shape).most == 2


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"target_strengths": [1.0]}, r"target_strengths=\[1.0\] in line 7"),
        ({"target_strengths": [1.0, 2.0, 3.0]}, "2 finite numbers"),
        ({"target_strengths": [1.0, "2"]}, "2 finite numbers"),
        ({"target_strengths": None}, "target_strengths=None in line 7"),
        ({"target_strengths": [1.0, float("nan")]}, "2 finite numbers"),
        ({"target_strengths": [1.0, 5.0]}, "strengths between -5 and 5"),
        ({"prompt": 3}, "'prompt' in line 7 .* is 3"),
    ],
)
def test_target_strengths_that_cannot_be_learned_are_named(
    files: Path, tmp_path: Path, row: dict[str, Any], said: str
) -> None:
    data = lines(tmp_path / "targets.jsonl", [*TARGETS, {"prompt": "x", "target_strengths": [0.0, 0.0], **row}])
    with pytest.raises(ColumnError) as caught:
        SaeSide.check(config_of(files, objective="mse", data=data), 1)
    assert re.search(said, str(caught.value))


def test_target_strengths_are_read_with_their_prompts(files: Path) -> None:
    options = sae_options(config_of(files).task)
    tokenizer = load_tokenizer(files / "model")
    rows = read_targets(str(files / "targets.jsonl"), options, tokenizer, 2, PredictorConfig())
    assert torch.equal(rows.targets_NS[:, 0], torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0, 1.25]))
    assert rows.prompts[2] == chat(tokenizer.fast, "Document 2 tells")


def test_only_the_objective_mse_takes_the_place_of_the_loop(files: Path) -> None:
    assert SaeSide.alone(config_of(files)) is None
    assert SaeSide.alone(config_of(files, objective="mse")) is fit


def test_strengths_are_named_by_place_and_feature() -> None:
    several = (Intervention(1, "features", sae="s", features=(4, 9)), Intervention(2, "global", sae="s"))
    assert names_of(several) == ["block1_feature4", "block1_feature9", "block2_global"]
    assert names_of((*several[1:], *several[1:])) == ["0_block2_global", "1_block2_global"]
