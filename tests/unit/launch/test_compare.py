"""Runs side by side: what is found, how seeds are taken together, what is written, and what is refused by name."""

from __future__ import annotations

import csv
import json
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from nla_megatron.config.compose import compose
from nla_megatron.contract.sidecar import InjectionSpec, ProjectionSpec
from nla_megatron.errors import ConfigError, MissingFile, NlaError, RunDirectoryError
from nla_megatron.evaluation.runs import find_runs
from nla_megatron.launch import compare
from tests.support.runs import learning, left_run
from tests.support.tiny import tiny_model, tiny_model_sidecar

RATES, SEEDS = (1e-4, 3e-4, 1e-3), (0, 1, 2)
STEPS = ("steps=30",)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three learning rates, three seeds each, all finished but one more that is not."""
    folder = tmp_path_factory.mktemp("compared") / "sweep"
    for rate in RATES:
        for seed in SEEDS:
            words = (f"optim.lr={rate}", f"seed={seed}", *STEPS)
            left_run(folder / f"lr={rate},seed={seed}", *words, metrics=learning(rate, seed))
    left_run(folder / "late", "optim.lr=1", *STEPS, finished=False)
    return folder


def compared(root: Path, out: Path, *words: str) -> dict[str, Any]:
    config = compare.configured([f"root={root}", f"out={out}", *words])
    compare.check(config, 1)
    compare.run(config)
    return dict(json.loads((out / "results.json").read_text()))


def refused(root: Path, out: Path, *words: str) -> NlaError:
    with pytest.raises(NlaError) as caught:
        compare.check(compare.configured([f"root={root}", f"out={out}", *words]), 1)
    assert not out.exists()
    return caught.value


def test_records_of_others_below_the_folder_are_told_and_passed_over(root: Path, tmp_path: Path) -> None:
    for name, content in {
        "foreign": "command: rl\nsteps: many\n", "keys": "command: rl\n", "list": "[1]", "nobody": "command: [rl]\n",
        "binary": "\0\1", ".hidden": "]",
    }.items():  # fmt: skip
        left_run(tmp_path / "in" / name, *STEPS)
        (tmp_path / "in" / name / "run.yaml").write_text(content)
    (tmp_path / "in" / "folder" / "run.yaml").mkdir(parents=True)
    left_run(tmp_path / "in" / "ours", *STEPS)
    runs, others = find_runs(tmp_path / "in", "rl", tmp_path / "out")
    assert [run.name for run in runs] == ["ours"]
    named = [other.partition(" ")[0] for other in others]
    assert named == ["binary", "folder", "foreign", "keys", "list"]
    assert all("another program's" in other for other in others)


def test_seeds_of_a_configuration_are_taken_together(root: Path, tmp_path: Path) -> None:
    found = compared(root, tmp_path / "out", "metric=reward", "last=5")
    assert [group["label"] for group in found["groups"]] == ["lr=0.001", "lr=0.0003", "lr=0.0001"]
    for group, rate in zip(found["groups"], reversed(RATES), strict=True):
        of_seeds = [statistics.fmean(row["reward"] for row in learning(rate, seed)[-5:]) for seed in SEEDS]
        assert group["n"] == 3
        assert group["mean"] == pytest.approx(statistics.fmean(of_seeds), rel=1e-12)
        assert group["std"] == pytest.approx(statistics.stdev(of_seeds), rel=1e-9)


def test_the_tables_hold_every_run_the_best_first(root: Path, tmp_path: Path) -> None:
    found = compared(root, tmp_path / "out", "metric=reward")
    lines = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert len(lines) == len(found["runs"]) == len(RATES) * len(SEEDS)
    rewards = [float(line["reward"]) for line in lines]
    assert rewards == sorted(rewards, reverse=True)
    assert [float(line["optim.lr"]) for line in lines[:3]] == [1e-3] * 3
    assert list(lines[0])[:6] == ["run", "checkpoint", "step", "optim.lr", "seed", "reward"]
    assert float(lines[0]["train.kl"]) == pytest.approx(statistics.fmean(1e-3 * step for step in range(20, 30)))


def test_a_loss_is_sorted_upwards_unless_told_otherwise(tmp_path: Path) -> None:
    for seed, loss in ((0, 3.0), (1, 1.0)):
        rows = [{"step": 0, "loss": loss}]
        left_run(tmp_path / "in" / str(seed), f"seed={seed}", "steps=1", metrics=rows, command="pretrain")
    words = ("command=pretrain",)
    assert [row["seed"] for row in compared(tmp_path / "in", tmp_path / "a", *words)["runs"]] == [1, 0]
    assert [row["seed"] for row in compared(tmp_path / "in", tmp_path / "b", *words, "best=max")["runs"]] == [0, 1]


def test_figures_of_a_runs_own_evaluation_have_columns(tmp_path: Path) -> None:
    figures = {"accuracy": 0.75, "thinking_tokens_mean": 31.5, "fve_ci95": [0.1, 0.2], "note": "text"}
    left_run(tmp_path / "in" / "a", *STEPS, metrics=learning(1e-3, 0), figures=figures)
    left_run(tmp_path / "in" / "b", *STEPS, "seed=1", metrics=learning(1e-3, 1), figures={"accuracy": 0.5})
    rows = compared(tmp_path / "in", tmp_path / "out")["runs"]
    assert [row["accuracy"] for row in rows] == [0.75, 0.5], "accuracy is the metric where there is no FVE"
    assert (rows[0]["thinking_tokens_mean"], rows[1]["thinking_tokens_mean"]) == (31.5, None)
    assert (rows[0]["fve_ci95_low"], rows[0]["fve_ci95_high"]) == (0.1, 0.2)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Accuracy" in page or "accuracy" in page
    assert "Thinking tokens, mean" in page and "31.5" in page


def test_every_scalar_asked_for_is_drawn_as_svg_and_png(root: Path, tmp_path: Path) -> None:
    from PIL import Image

    compared(root, tmp_path / "out", "metric=reward", "curves=[reward,kl]")
    curves = tmp_path / "out" / "curves"
    assert sorted(path.name for path in curves.iterdir()) == ["kl.png", "kl.svg", "reward.png", "reward.svg"]
    drawing = ElementTree.parse(curves / "reward.svg").getroot()
    assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
    with Image.open(curves / "reward.png") as image:
        assert image.format == "PNG" and image.width > 1000
        colours = {colour for _, colour in image.getcolors(1 << 24)}
    # A line of each configuration, in the charts' first three colours.
    assert {(0x3B, 0x64, 0xAD), (0xC2, 0x69, 0x1C), (0x2F, 0x8A, 0x68)} <= colours


def test_png_can_be_left_out(root: Path, tmp_path: Path) -> None:
    compared(root, tmp_path / "out", "metric=reward", "png=false")
    assert {path.suffix for path in (tmp_path / "out" / "curves").iterdir()} == {".svg"}


class Page(HTMLParser):
    """The text of a page; fails on what another file or a script is needed for."""

    text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe")
        assert not any(name in ("src", "href") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_names_every_run_and_needs_nothing_beside_itself(root: Path, tmp_path: Path) -> None:
    compared(root, tmp_path / "out", "metric=reward")
    page = Page()
    page.feed((tmp_path / "out" / "report.html").read_text())
    assert all(f"lr={rate},seed={seed}" in page.text for rate in RATES for seed in SEEDS)
    assert "9 finished runs of 3 configurations" in page.text
    assert "late: not finished" in page.text


def test_markup_in_a_runs_values_is_text_on_the_page(tmp_path: Path) -> None:
    for seed, text in enumerate(("plain", "<script>alert(1)</script>")):
        words = (f"logger.wandb_project='{text}'", f"rollout.stop=['{text}']", f"seed={seed}", *STEPS)
        left_run(tmp_path / "in" / str(seed), *words, metrics=learning(1e-3, seed))
    compared(tmp_path / "in", tmp_path / "out", "metric=reward")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page


def test_more_runs_are_added_by_the_same_command(root: Path, tmp_path: Path) -> None:
    left_run(tmp_path / "in" / "a", *STEPS, metrics=learning(1e-3, 0))
    out = tmp_path / "in" / "compared"
    assert len(compared(tmp_path / "in", out, "metric=reward")["runs"]) == 1
    left_run(tmp_path / "in" / "b", *STEPS, "seed=1", metrics=learning(1e-3, 1))
    assert len(compared(tmp_path / "in", out, "metric=reward")["runs"]) == 2


def test_no_runs_under_the_root(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    error = refused(tmp_path / "empty", tmp_path / "out")
    assert isinstance(error, MissingFile) and str(tmp_path / "empty") in error.found


def test_a_root_that_is_not_there(tmp_path: Path) -> None:
    assert "nowhere" in refused(tmp_path / "nowhere", tmp_path / "out").found


def test_only_unfinished_runs(tmp_path: Path) -> None:
    left_run(tmp_path / "in" / "a", *STEPS, finished=False)
    assert "1 that are not" in refused(tmp_path / "in", tmp_path / "out").found


def test_a_metric_that_no_run_has_is_named_with_those_there_are(root: Path, tmp_path: Path) -> None:
    error = refused(root, tmp_path / "out", "metric=beauty")
    assert isinstance(error, ConfigError)
    assert "metric=beauty" in error.found and "eval_fve, kl, reward" in error.expected


def test_such_a_metric_is_named_before_anything_is_evaluated(tmp_path: Path) -> None:
    left_run(tmp_path / "in" / "a", *STEPS, "held_out=held.parquet", metrics=learning(1e-3, 0))
    assert "metric=beauty" in refused(tmp_path / "in", tmp_path / "out", "metric=beauty").found


def test_what_an_evaluation_needs_is_checked_for_every_run(tmp_path: Path) -> None:
    left_run(tmp_path / "in" / "a", *STEPS, "held_out=held.parquet", metrics=learning(1e-3, 0))
    error = refused(tmp_path / "in", tmp_path / "out")
    assert isinstance(error, MissingFile) and "(evaluation of a)" in error.found


def test_runs_of_different_data_are_named(tmp_path: Path) -> None:
    left_run(tmp_path / "in" / "one", *STEPS, metrics=learning(1e-3, 0))
    left_run(tmp_path / "in" / "other", *STEPS, "data=other.parquet", metrics=learning(1e-3, 0))
    error = refused(tmp_path / "in", tmp_path / "out")
    assert isinstance(error, ConfigError)
    assert all(word in error.found for word in ("rl.parquet in one", "other.parquet in other"))


def test_runs_with_different_held_out_tables_are_named(tmp_path: Path) -> None:
    for name in ("one", "other"):
        left_run(tmp_path / "in" / name, *STEPS, f"held_out={name}.parquet", metrics=learning(1e-3, 0))
    error = refused(tmp_path / "in", tmp_path / "out")
    assert "held_out=one.parquet in one" in error.found and "other.parquet in other" in error.found


def test_runs_of_different_tasks_are_named(tmp_path: Path) -> None:
    import yaml

    for name in ("one", "other"):
        left_run(tmp_path / "in" / name, *STEPS, metrics=learning(1e-3, 0))
        path = tmp_path / "in" / name / "run.yaml"
        record = yaml.safe_load(path.read_text())
        record["task"] = {"name": {"one": "nla", "other": "math"}[name]}
        path.write_text(yaml.safe_dump(record))
    error = refused(tmp_path / "in", tmp_path / "out", "metric=reward")
    assert "task.name=nla in one" in error.found and "math in other" in error.found


def test_permanent_checkpoints_where_no_run_kept_any(root: Path, tmp_path: Path) -> None:
    error = refused(root, tmp_path / "out", "checkpoints=permanent")
    assert "no permanent checkpoint" in error.found and "keep_every" in error.expected


def kept(run: Path) -> Path:
    step = run / "checkpoints" / "permanent" / "step_00000010"
    step.mkdir(parents=True)
    (step / "state.json").write_text("{}")
    return step


@pytest.mark.parametrize("held", ["weights", "adapters", "projection", "predictor"])
def test_what_is_no_whole_model_in_a_checkpoint_is_exported_as_the_run_would(tmp_path: Path, held: str) -> None:
    base, rows = tiny_model(tmp_path / "base"), "held_out=held.parquet"
    spec = InjectionSpec("project", 1, 1.0, None, ProjectionSpec())
    tiny_model_sidecar(tmp_path / "av", base, "av", *([spec] if held == "projection" else []))
    more = {"adapters": ["lora.rank=4"], "predictor": ["task=sae", "model=base"]}.get(held, [])
    run = left_run(tmp_path / "in" / "one", *STEPS, *more, rows, f"av={tmp_path / 'av'}", "parallel=tp2")
    step = kept(run)
    config = compare.configured([f"root={tmp_path / 'in'}", f"out={tmp_path / 'out'}", "checkpoints=permanent"])
    compare.check(config, 1)
    runs, _ = find_runs(tmp_path / "in", "rl", tmp_path / "out")
    [place] = compare.places_of(config, runs)
    jobs = compare.export_jobs(config, place)
    if held == "weights":
        assert [(job.argv[0], job.argv[2], job.ranks) for job in jobs] == [
            ("convert", f"checkpoint='{step / role}'", 1) for role in ("av", "ar")
        ]
    else:
        [job] = jobs
        assert job.argv[:3] == ("export", f"checkpoint='{step}'", f"out='{place.models}'")
        assert (job.ranks, compose("export", job.argv[1:]).parallel.tp) == (2, 2)


def test_exports_that_do_not_fit_are_refused_before_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_model(tmp_path / "base")
    tiny_model_sidecar(tmp_path / "av", base, "av")
    told = (*STEPS, "lora.rank=4", "held_out=held.parquet", f"av={tmp_path / 'av'}", "parallel=tp2")
    kept(left_run(tmp_path / "in" / "one", *told))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert "of 2 ranks on 1 GPUs" in refused(tmp_path / "in", tmp_path / "out", "checkpoints=permanent").found


def test_what_no_evaluation_reads_is_named(tmp_path: Path) -> None:
    left_run(tmp_path / "in" / "one", *STEPS, "task=lexical", "model=base", "held_out=held.jsonl")
    error = refused(tmp_path / "in", tmp_path / "out", "eval.dtype=bfloat16")
    assert "dtype='bfloat16' in eval task=lexical" in error.found


def test_checkpoints_of_a_run_that_sampled_nothing_are_refused(tmp_path: Path) -> None:
    told = ("task=sae", "held_out=held.jsonl", "model=base", "task.options.objective=mse")
    kept(left_run(tmp_path / "in" / "a", *STEPS, *told))
    error = refused(tmp_path / "in", tmp_path / "out", "checkpoints=permanent")
    assert "checkpoints=permanent with a, which sampled nothing" in error.found and "checkpoints=final" in error.remedy


def test_a_directory_of_something_else(root: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    config = compare.configured([f"root={root}", f"out={tmp_path / 'out'}", "metric=reward"])
    with pytest.raises(RunDirectoryError, match="not empty"):
        compare.check(config, 1)


def test_a_comparison_of_another_folder(root: Path, tmp_path: Path) -> None:
    compared(root, tmp_path / "out", "metric=reward")
    left_run(tmp_path / "in" / "a", *STEPS, metrics=learning(1e-3, 0))
    config = compare.configured([f"root={tmp_path / 'in'}", f"out={tmp_path / 'out'}", "metric=reward"])
    with pytest.raises(RunDirectoryError, match="compares the runs under"):
        compare.check(config, 1)
