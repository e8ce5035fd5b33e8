"""`eval task=sae`: what is refused by name before a sample, whose strengths are judged, and the figures by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nla_megatron.config.compose import compose
from nla_megatron.config.schema import EvalConfig, ParallelConfig, RewardConfig, RolloutConfig, TaskConfig
from nla_megatron.conversion.hf import read_shape
from nla_megatron.errors import (
    CheckpointError,
    ColumnError,
    ConfigError,
    LayoutError,
    MissingFile,
    NlaError,
    WidthError,
)
from nla_megatron.evaluation.answers import held_out_task
from nla_megatron.evaluation.command import check
from nla_megatron.evaluation.steered import results_of, reward_of, rows_of, write
from nla_megatron.evaluation.strengths import Steering, steering_of, strengths_of
from nla_megatron.interventions.schedules import Schedule
from nla_megatron.interventions.spec import Intervention
from nla_megatron.models.strength import PredictorConfig, StrengthPredictor
from nla_megatron.models.strength_files import STEPS_PER_EPOCH, write_predictor
from nla_megatron.parallel.world import World
from nla_megatron.tasks.sae import SaeOptions, sae_options
from nla_megatron.tasks.steering_report import Comparison, Side
from tests.support.hooked import Hooked, write_sae
from tests.support.measured import measured
from tests.support.tiny import SHAPE, tiny_model

FEATURES = (3, 7)
WORDS = RewardConfig(terms={"lexical_richness": {}})


def trained(folder: Path, **changes: Any) -> Intervention:
    """What the predictor `fits` was trained to steer."""
    return replace(Intervention(1, "features", "generated", sae=str(folder / "sae"), features=FEATURES), **changes)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steered")
    tiny_model(folder / "model")
    for name, width in (("sae", SHAPE.hidden_size), ("other_sae", SHAPE.hidden_size), ("narrow", 32)):
        write_sae(folder / name, width)
    for name, count in (("prompts", 12), ("one", 1), ("empty", 0)):
        rows = [json.dumps({"prompt": f"Document {number} tells"}) + "\n" for number in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(rows))
    model, shapes = str(folder / "model"), {"fits": (SHAPE.hidden_size, 2), "wide": (80, 2), "three": (64, 3)}
    for name, (width, strengths) in shapes.items():
        predictor = StrengthPredictor(width, strengths, PredictorConfig(hidden=8), seed=3)
        write_predictor(folder / name, predictor, [trained(folder)], model, {"steps": 40})
    predictor = StrengthPredictor(SHAPE.hidden_size, 2, PredictorConfig(hidden=8))
    write_predictor(folder / "elsewhere", predictor, [trained(folder)], str(folder / "another"), {"steps": 40})
    write_predictor(folder / "torn", predictor, [trained(folder)], model, {"steps": 40})
    write_predictor(folder / "told", predictor, [trained(folder)], model, {"steps": 40, STEPS_PER_EPOCH: 3.0})
    (folder / "torn" / "predictor.safetensors").unlink()
    (folder / "damaged").mkdir()
    (folder / "damaged" / "predictor.json").write_text("{")
    return folder


def place(files: Path, **changes: Any) -> dict[str, Any]:
    return {"layer": 1, "sae": str(files / "sae"), "features": list(FEATURES), **changes}


def config_of(files: Path, exported: str | None = "fits", **given: Any) -> EvalConfig:
    """An evaluation that is in order but for what is given: keys of the configuration, else options of the task."""
    options = {} if exported is None else {"predictor": {"path": str(files / exported)}}
    run = {key: given.pop(key) for key in tuple(given) if key in EvalConfig.__dataclass_fields__}
    base = EvalConfig(
        out=str(files / "eval"), model=str(files / "model"), data=str(files / "prompts.jsonl"), rows=8,
        task=TaskConfig("sae", {**options, **given}), rollout=RolloutConfig(max_new_tokens=8), bootstrap=200,
    )  # fmt: skip
    return replace(base, **run)


def test_what_is_in_order_passes_with_a_predictor_and_with_fixed_strengths(files: Path) -> None:
    check(config_of(files), 1)
    check(config_of(files, reward=WORDS, interventions=[place(files)]), 1)
    check(config_of(files, None, interventions=[place(files)], fixed_strengths=[1.0, -2.0]), 1)


@pytest.mark.parametrize(
    ("exported", "given", "error", "said"),
    [
        (None, {}, ConfigError, "predictor.path=None and task.options.fixed_strengths=[]"),
        ("fits", {"fixed_strengths": [1.0]}, ConfigError, "fixed_strengths=[1.0]"),
        ("nowhere", {}, MissingFile, "predictor.json"),
        ("damaged", {}, CheckpointError, "predictor.json"),
        ("torn", {}, MissingFile, "predictor.safetensors"),
        ("wide", {}, WidthError, "features 80 wide"),
        ("three", {}, WidthError, "makes 3 strengths"),
        ("elsewhere", {}, ConfigError, "model="),
        ("fits", {"place": {"features": [3, 8]}}, ConfigError, "interventions[0].features=(3, 8)"),
        ("fits", {"place": {"layer": 2}}, ConfigError, "interventions[0].layer=2"),
        ("fits", {"place": {"where": "all"}}, ConfigError, "interventions[0].where=all"),
        ("fits", {"place": {"max_acts": [2.0, 1.0]}}, ConfigError, "interventions[0].max_acts=(2.0, 1.0)"),
        ("fits", {"place": {"sae": "other_sae"}}, ConfigError, "interventions[0].sae="),
        ("fits", {"steering": False}, ConfigError, "steering=false"),
        ("fits", {"compare_samples": 2}, ConfigError, "compare_samples=2"),
        ("fits", {"prompts": {"name": "lexicl"}}, ConfigError, "task 'lexicl'"),
        (None, {"fixed_strengths": [1.0]}, ConfigError, "no task.options.interventions"),
        (None, {"fixed_strengths": [1.0, 2.0, 3.0], "place": {}}, ConfigError, "3 task.options.fixed_strengths"),
        (None, {"fixed_strengths": [float("nan")], "place": {}}, ConfigError, "fixed_strengths=[nan]"),
        (None, {"fixed_strengths": [1.0], "place": {"sae": "narrow"}}, WidthError, "narrow' is 32 wide"),
        (None, {"fixed_strengths": [1.0], "place": {"layer": 9}}, ConfigError, "block 9"),
        (None, {"fixed_strengths": [1.0], "place": {}, "predictor": {"hidden": 4}}, ConfigError, "predictor.hidden"),
        ("fits", {"model": ""}, MissingFile, "config.json"),
        ("fits", {"data": "nowhere"}, MissingFile, "nowhere"),
        ("fits", {"data": "empty"}, ColumnError, "no prompts"),
        ("fits", {"data": "one"}, ConfigError, "1 rows"),
        ("fits", {"samples": 2, "rollout": RolloutConfig(temperature=0.0)}, ConfigError, "samples=2"),
        ("fits", {"rollout": RolloutConfig(max_new_tokens=300)}, LayoutError, "max_new_tokens=300"),
        ("fits", {"compare": "/nowhere"}, MissingFile, "/nowhere"),
        ("fits", {"reward": RewardConfig(terms={"correctness": {}})}, ConfigError, "'correctness' reads correct"),
        ("fits", {"parallel": ParallelConfig(tp=3)}, LayoutError, "tp=3"),
    ],
)  # fmt: skip
def test_mistakes_are_named_before_anything_is_sampled(
    files: Path, exported: str | None, given: dict[str, Any], error: type[NlaError], said: str
) -> None:
    given = dict(given)
    if "place" in given:
        changes = given.pop("place")
        given["interventions"] = [place(files, **{**changes, "sae": str(files / changes.get("sae", "sae"))})]
    if "data" in given:
        given["data"] = str(files / f"{given['data']}.jsonl")
    with pytest.raises(error) as caught:
        check(config_of(files, exported, **given), 3 if "parallel" in given else 1)
    assert type(caught.value) is error and said in caught.value.found
    assert not (files / "eval").exists()


def changing(epoch: int, by: str = "epoch") -> RewardConfig:
    term = {"weight": 1.0, "later_weight": 5.0, "change_at": epoch, "change_by": by}
    return RewardConfig(terms={"lexical_richness": term})


@pytest.mark.parametrize(("epoch", "weight"), [(13, 5.0), (14, 1.0)])
def test_a_reward_that_changes_by_epoch_stands_at_the_last_epoch_of_the_predictors_run(
    files: Path, world: World, epoch: int, weight: float
) -> None:
    """Step 39 of a run of three steps per epoch is of epoch 13."""
    config = config_of(files, "told", reward=changing(epoch))
    check(config, 1)
    options = sae_options(config.task)
    task, steering = held_out_task(config, options.text_task), steering_of(options, config.model, SHAPE)
    rewards = reward_of(config, task, steering, world)
    assert rewards is not None
    # Of 80 words, one of them, there is no penalty.
    assert rewards(measured(["word " * 80]), steering.step).tolist() == pytest.approx([weight / 80])


@pytest.mark.parametrize("exported", ["fits", None])
def test_without_the_length_of_an_epoch_the_remedy_is_named(files: Path, exported: str | None) -> None:
    given = {} if exported else {"fixed_strengths": [1.0], "interventions": [place(files)]}
    with pytest.raises(ConfigError, match="change_by=epoch, and no steps_per_epoch in") as caught:
        check(config_of(files, exported, reward=changing(13), **given), 1)
    key = "reward.terms.lexical_richness"
    assert caught.value.remedy == f"count in steps: {key}.change_by=step {key}.change_at=N"
    check(config_of(files, exported, reward=changing(39, "step"), **given), 1)


@pytest.mark.parametrize("task", ["nla", "math", "lexical"])
def test_a_reward_is_refused_where_no_evaluation_reads_it(task: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(compose("eval", ["out=x", f"task={task}", "reward=lexical", "model=m"]), 1)
    assert f"reward= with task={task}" in caught.value.found


def test_what_a_predictor_steers_and_how_far_its_training_went_are_in_its_file(files: Path) -> None:
    found = steering_of(sae_options(config_of(files).task), str(files / "model"), SHAPE)
    assert found == Steering((trained(files),), step=39, predictor=str(files / "fits"))


def test_one_fixed_strength_is_for_all_and_schedules_stand_at_their_end(files: Path) -> None:
    schedule = {"kind": "linear", "over": "training", "start": 0.0, "end": 1.0, "steps": 6}
    options = {"interventions": [place(files, schedule=schedule)], "fixed_strengths": [2.5]}
    found = steering_of(sae_options(TaskConfig("sae", options)), str(files / "model"), SHAPE)
    assert found.fixed == (2.5, 2.5) and found.interventions[0].schedule == Schedule(**schedule)
    assert found.interventions[0].strengths(found.fixed, found.step) == (2.5, 2.5)


def test_strengths_are_the_predictors_of_the_mean_last_states(files: Path, world: World) -> None:
    prompts = [(5, 9, 11), (30, 31, 32, 33), (5, 9, 11)]
    steering = steering_of(sae_options(config_of(files).task), str(files / "model"), read_shape(files / "model"))
    found = strengths_of(steering, prompts, config_of(files), world)
    model = Hooked(files / "model").model
    with torch.no_grad():
        states = [model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0].mean(0) for ids in prompts]
        wanted = StrengthPredictor(SHAPE.hidden_size, 2, PredictorConfig(hidden=8), seed=3)(torch.stack(states))
    assert torch.allclose(found, wanted, atol=1e-4) and not torch.allclose(found[0], found[1], atol=1e-3)
    fixed = strengths_of(replace(steering, fixed=(1.0, 0.5)), prompts, config_of(files), world)
    assert fixed.tolist() == [[1.0, 0.5]] * 3


def comparison(rewards: bool = True) -> Comparison:
    """Two responses to each of three rows."""
    on, off = (1.0, 0.5, 0.75, 0.25, 0.0, 0.5), (0.5, 0.5, 0.25, 0.25, 0.25, 0.25)
    texts = ("a", "<script>", "half \ud83d", "d", "e", "f")
    return Comparison(
        step=40, rows=(9, 9, 4, 4, 7, 7), samples=(0, 1) * 3, figure="richness",
        prompts=("one", "one", "two <b>", "two <b>", "three", "three"),
        steered=Side(on if rewards else None, texts, (4,) * 6, {"richness": 0.75}, (1.0, 0.5) * 3),
        plain=Side(off if rewards else None, tuple("uvwxyz"), (5,) * 6, {"richness": 0.5}, (0.5,) * 6),
        strengths={"block1_feature3": {"mean": 1.5, "std": 0.5, "min": 1.0, "max": 2.0}}, applied=24, failed=0,
    )  # fmt: skip


def test_gains_are_paired_and_their_intervals_are_over_whole_prompts(files: Path) -> None:
    config = config_of(files, samples=2)
    found = results_of(config, SaeOptions(), comparison())
    gains = np.array([0.5, 0.0, 0.5, 0.0, -0.25, 0.25])
    assert found["reward_gain"] == pytest.approx(gains.mean()) == pytest.approx(found["reward"] - found["reward_plain"])
    assert (found["rows"], found["samples"], found["prompts"], found["richness_gain"]) == (3, 2, "lexical", 0.25)
    # By hand: Student's interval of three prompts, each with both of its responses.
    by_prompt = gains.reshape(3, 2).mean(1)
    half = 4.302653 * by_prompt.std(ddof=1) / np.sqrt(3)
    assert found["reward_gain_ci95"] == pytest.approx([gains.mean() - half, gains.mean() + half])
    assert found["richness_gain_ci95"] == [0.25, 0.25], "every prompt gains the same"
    assert found["richness_ci95"][1] <= 1, "a share is nowhere above one"
    assert found["strengths"]["block1_feature3"]["max"] == 2.0 and found["steered_tokens"] == 24


def test_without_a_reward_the_tasks_own_figure_is_compared(files: Path) -> None:
    found, rows = results_of(config_of(files), SaeOptions(), comparison(False)), rows_of(comparison(False))
    assert not any("reward" in key for key in (*found, *rows))
    assert found["richness_gain"] == 0.25 and rows["richness_plain"] == [0.5] * 6


def test_files_and_page_show_both_sides_as_text(files: Path, tmp_path: Path) -> None:
    config = config_of(files, samples=2, examples=3, out=str(tmp_path))
    strengths = {9: [1.0], 4: [1.5], 7: [2.0]}
    write(config, SaeOptions(), comparison(), ["block1_feature3"], strengths)
    examples = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
    assert [(each["row"], each["sample"], each["response_plain"]) for each in examples] == [
        (9, 0, "u"), (9, 1, "v"), (4, 0, "w"),
    ]  # fmt: skip
    assert examples[2]["strengths"] == {"block1_feature3": 1.5} and examples[2]["reward_plain"] == 0.25
    page = (tmp_path / "report.html").read_text()
    assert "&lt;script&gt;" in page and "<script" not in page and "two &lt;b&gt;" in page
    assert page.count("<article>") == 3 and "0.167" in page and "block1_feature3" in page
    assert "http" not in page


def test_two_predictors_are_compared_response_by_response(files: Path, tmp_path: Path) -> None:
    write(config_of(files, out=str(tmp_path / "a")), SaeOptions(), comparison(), ["f"], {9: [1.0], 4: [1.0], 7: [1.0]})
    better = replace(comparison(), steered=replace(comparison().steered, rewards=(1.5, 1.0, 1.25, 0.75, 0.5, 1.0)))
    config = config_of(files, out=str(tmp_path / "b"), compare=str(tmp_path / "a"))
    write(config, SaeOptions(), better, ["f"], {9: [1.0], 4: [1.0], 7: [1.0]})
    found = json.loads((tmp_path / "b" / "eval.json").read_text())
    assert found["reward_over_compared"] == 0.5 and found["reward_over_compared_ci95"] == [0.5, 0.5]
    with pytest.raises(ConfigError, match="other rows"):
        write(config, SaeOptions(), replace(better, rows=(8, 8, 4, 4, 7, 7)), ["f"], {8: [1.0], 4: [1.0], 7: [1.0]})
