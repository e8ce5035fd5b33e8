"""`sft` from its command line, in one process: both models at once, resumption, curricula, heads, refusals."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nla_megatron.cli import main
from nla_megatron.config.compose import compose
from nla_megatron.contract import columns
from nla_megatron.contract.sidecar import (
    InjectionSpec,
    PoolSpec,
    ProjectionSpec,
    ReconstructorSpec,
    read_dataset_sidecar,
    read_model_sidecar,
    write_dataset_sidecar,
)
from nla_megatron.conversion.hf import HEAD_FILE, VALUE_HEAD, read_shape
from nla_megatron.conversion.projections import PROJECTION_FILE, read_projections
from nla_megatron.errors import ColumnError, MarkerError
from nla_megatron.interventions.projection import Projection, projector
from nla_megatron.tasks.nla import NlaTask
from nla_megatron.training.sft import check
from tests.support.tiny import LAYER, tiny_model, tiny_rows, tiny_table, tiny_tables

STEPS = 4
COMMON = (f"steps={STEPS}", "batch_size=6", "micro_batch_size=4", "optim.lr=1e-3")
QUIET = ("save_every=2", "logger.progress=false")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, base: Path) -> dict[str, Path]:
    return tiny_tables(tmp_path_factory.mktemp("data"), base)


def sft(role: str, base: Path, data: dict[str, Path], out: Path, *overrides: str) -> list[str]:
    tables = [f"data={data['ar_sft' if role == 'ar' else 'av_sft']}"]
    beside = [f"ar_data={data['ar_sft']}", "ar_optim.lr=1e-3"] if role == "both" else []
    return ["sft", f"role={role}", f"model={base}", *tables, *beside, f"out={out}", *COMMON, *QUIET, *overrides]


def ran(*arguments: Any) -> Path:
    command = sft(*arguments)
    assert main(command) == 0
    [out] = [word for word in command if word.startswith("out=")]
    return Path(out.removeprefix("out="))


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_weights(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.glob("*.safetensors"))
    assert names == sorted(path.name for path in other.glob("*.safetensors"))
    pairs = [(load_file(one / name), load_file(other / name)) for name in names]
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)


@pytest.fixture(scope="module")
def both(base: Path, data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ran("both", base, data, tmp_path_factory.mktemp("both") / "run", "reconstructor.pooling=mean")


def test_both_at_once_are_the_two_that_are_trained_alone(
    base: Path, data: dict[str, Path], both: Path, tmp_path: Path
) -> None:
    av = ran("av", base, data, tmp_path / "av")
    ar = ran("ar", base, data, tmp_path / "ar", "reconstructor.pooling=mean")
    assert same_weights(both / "av", av / "hf") and same_weights(both / "ar", ar / "hf")
    for together, one, other in zip(metrics(both), metrics(av), metrics(ar), strict=True):
        assert (together["av_loss"], together["ar_loss"]) == (one["loss"], other["loss"])
    assert not (both / "hf").exists()
    for role in ("av", "ar"):
        assert read_model_sidecar(both / role).role == role


def test_a_run_of_both_goes_on_from_its_checkpoint_to_the_bit(
    base: Path, data: dict[str, Path], both: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(both, tmp_path / "run"))
    assert {path.name for path in run.glob("checkpoints/step_00000002/a*")} == {"av", "ar"}
    shutil.rmtree(run / "checkpoints" / f"step_{STEPS:08d}")
    for role in ("av", "ar"):
        shutil.rmtree(run / role)
    (run / "done").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2]))
    ran("both", base, data, run, "reconstructor.pooling=mean")
    assert metrics(run) == metrics(both)
    assert same_weights(run / "av", both / "av") and same_weights(run / "ar", both / "ar")


def test_a_curriculum_trains_with_the_strength_of_its_step(base: Path, data: dict[str, Path], tmp_path: Path) -> None:
    """Its first step is that of a table with three times the strength, a step after its end that of the table's own."""
    options = ("curriculum.kind=linear", "curriculum.start=3", "curriculum.steps=2", "optim.lr=0", "export=false")
    run = ran("av", base, data, tmp_path / "run", *options)
    plain = ran("av", base, data, tmp_path / "plain", "optim.lr=0", "export=false")
    stronger = dict(data, av_sft=Path(shutil.copy(data["av_sft"], tmp_path / "av_sft.parquet")))
    sidecar = read_dataset_sidecar(data["av_sft"])
    write_dataset_sidecar(stronger["av_sft"], replace(sidecar, injection=InjectionSpec("norm_add", 1, 3.0)))
    strong = ran("av", base, stronger, tmp_path / "strong", "optim.lr=0", "export=false")
    losses = {path.name: [line["loss"] for line in metrics(path)] for path in (run, plain, strong)}
    assert losses["run"][0] == losses["strong"][0] != losses["plain"][0]
    assert losses["run"][2:] == losses["plain"][2:]
    assert losses["run"][1] not in (losses["strong"][1], losses["plain"][1])


def test_an_ar_that_is_trained_on_keeps_its_head(base: Path, data: dict[str, Path], tmp_path: Path) -> None:
    ways = ("reconstructor.pooling=weighted", "reconstructor.projection_layers=2", "reconstructor.layer=1")
    first = ran("ar", base, data, tmp_path / "first", *ways, "reconstructor.dropout=0.2", "ar_loss.kind=cosine")
    second = ran("ar", first / "hf", data, tmp_path / "second", "ar_loss.variance_reg=0.1")
    for run in (first, second):
        found = read_model_sidecar(run / "hf")
        assert found.reconstructor == ReconstructorSpec("weighted", 2, 0.2, 1)
        assert found.extraction.layer_index == LAYER and read_shape(run / "hf").num_layers == 2
        assert (run / "hf" / HEAD_FILE).is_file() and not (run / "hf" / VALUE_HEAD).exists()
    assert metrics(second)[0]["mse"] < metrics(first)[0]["mse"]
    assert "ar_variance" in metrics(second)[0] and "ar_variance" not in metrics(first)[0]


@pytest.fixture(scope="module")
def projecting(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same tables, whose activations go through a projection of two layers."""
    injection, out = InjectionSpec("project", 1, 1.0, None, ProjectionSpec("norm_add", 2, 0.25)), dict(data)
    for stage in ("av_sft", "ar_sft", "rl"):
        out[stage] = Path(shutil.copy(data[stage], tmp_path_factory.mktemp("projecting") / f"{stage}.parquet"))
        write_dataset_sidecar(out[stage], replace(read_dataset_sidecar(data[stage]), injection=injection))
    return out


@pytest.fixture(scope="module")
def projected(base: Path, projecting: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ran("av", base, projecting, tmp_path_factory.mktemp("projected") / "run")


def test_a_projection_learns_with_the_av_and_goes_on_from_a_checkpoint_and_from_an_av(
    base: Path, projecting: dict[str, Path], projected: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(projected, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints" / f"step_{STEPS:08d}")
    shutil.rmtree(run / "hf")
    (run / "done").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2]))
    ran("av", base, projecting, run)
    assert metrics(run) == metrics(projected)
    taught = load_file(projected / "hf" / PROJECTION_FILE)
    assert all(torch.equal(tensor, taught[name]) for name, tensor in load_file(run / "hf" / PROJECTION_FILE).items())
    start = {f"0.{name}": tensor for name, tensor in Projection(64, 64, 2).state_dict().items()}
    assert taught.keys() == start.keys()
    assert all(float((taught[name] - tensor).abs().max()) > 1e-4 for name, tensor in start.items())
    still = ran("av", projected / "hf", projecting, tmp_path / "still", "optim.lr=0")
    assert all(torch.equal(tensor, taught[name]) for name, tensor in load_file(still / "hf" / PROJECTION_FILE).items())
    assert metrics(still)[0]["loss"] < metrics(projected)[0]["loss"]
    other = ran("av", base, projecting, tmp_path / "other", "seed=1", "steps=1", "optim.lr=0")
    first = load_file(other / "hf" / PROJECTION_FILE)["0.linears.0.weight"]
    assert torch.equal(first, Projection(64, 64, 2, seed=1).linears[0].weight)


def test_an_av_without_its_projection_is_named_before_anything_is_trained(
    projecting: dict[str, Path], projected: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(projected / "hf", tmp_path / "av")
    (tmp_path / "av" / PROJECTION_FILE).unlink()
    assert main(sft("av", tmp_path / "av", projecting, tmp_path / "run")) == 2
    assert capsys.readouterr().err.startswith(f"MissingFile: no {PROJECTION_FILE}")
    assert not (tmp_path / "run").exists()


def verbalise() -> Any:
    """The module of examples/verbalize.py."""
    path = Path(__file__).parents[3] / "examples" / "verbalize.py"
    spec = importlib.util.spec_from_file_location("verbalize", path)
    assert spec is not None and spec.loader is not None
    verbalize = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(verbalize)
    return verbalize


def test_the_example_projects_as_the_sampler_does(projecting: dict[str, Path], projected: Path) -> None:
    task = NlaTask.open(str(projecting["rl"]), "rl", str(projected / "hf"))
    raw_ND = task.table.vectors([0, 3])
    expected_ND = projector(read_projections(projected / "hf", task.interventions, 64))(0, raw_ND)
    assert task.sidecar.injection is not None
    found_ND = verbalise().projected(projected / "hf", task.sidecar.injection, 0, torch.from_numpy(raw_ND))
    torch.testing.assert_close(found_ND, torch.from_numpy(expected_ND))
    assert isinstance(verbalise().write(projected / "hf", torch.from_numpy(raw_ND[0]), 4), str)


def test_the_example_reads_any_head(base: Path, data: dict[str, Path], both: Path, tmp_path: Path) -> None:
    """examples/verbalize.py, by transformers, against the mean of the stream times the exported matrix."""
    verbalize = verbalise()
    reader = verbalize.Reader(both / "ar")
    ids = reader.contract.ar_ids(reader.tokenizer, "about birds")
    stream_TD = reader.backbone(torch.tensor([ids])).last_hidden_state[0].detach()
    expected = load_file(both / "ar" / HEAD_FILE)["weight"] @ stream_TD.mean(0)
    torch.testing.assert_close(reader.reconstruct("about birds"), expected)
    plain = verbalize.Reader(ran("ar", base, data, tmp_path / "plain") / "hf")
    stream_TD = plain.backbone(torch.tensor([ids])).last_hidden_state[0].detach()
    expected = load_file(tmp_path / "plain" / "hf" / VALUE_HEAD)["weight"] @ stream_TD[-1]
    torch.testing.assert_close(plain.reconstruct("about birds"), expected)
    vector_D = torch.from_numpy(NlaTask.open(str(data["rl"]), "rl", str(base)).table.vectors([0]))[0]
    assert isinstance(verbalize.write(both / "av", vector_D, 4), str)


@pytest.mark.parametrize("role", ["av", "ar"])
def test_a_row_that_is_too_long_is_named_before_anything_is_trained(
    role: str, base: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    task = NlaTask.open(str(data[f"{role}_sft"]), f"{role}_sft", str(base))
    if role == "av":
        sequences = [[*task.prompt_ids, *task.gold_response_ids(row)] for row in range(task.table.n_rows)]
    else:
        sequences = task.gold_text_batch(range(task.table.n_rows)).ids
    longest = max(map(len, sequences))
    words = [word for word in sft(role, base, data, tmp_path / "run") if "=" in word]
    check(compose("sft", [*words, f"max_length={longest}"]), 1)
    with pytest.raises(ColumnError, match=f"a row of {longest} tokens"):
        check(compose("sft", [*words, f"max_length={longest - 1}"]), 1)


def test_rows_of_any_number_of_activations_learn_alike_in_any_microbatch(base: Path, tmp_path: Path) -> None:
    rows = tiny_rows(64, positions=3, fewest=1)
    tables = {
        stage: tiny_table(tmp_path / f"{stage}.parquet", base, stage, rows) for stage in ("av_sft", "ar_sft", "rl")
    }  # fmt: skip
    runs = {size: ran("both", base, tables, tmp_path / size, f"micro_batch_size={size}") for size in ("1", "4")}
    for alone, together in zip(metrics(runs["1"]), metrics(runs["4"]), strict=True):
        for name in ("av_loss", "ar_loss", "av_grad_norm"):
            assert alone[name] == pytest.approx(together[name], rel=1e-4)
    assert (
        read_model_sidecar(runs["4"] / "av").pool
        == read_model_sidecar(runs["4"] / "ar").pool
        == PoolSpec("stack", 3, 1)
    )
    task = NlaTask.open(str(tables["rl"]), "rl", str(base))
    task.check_model(str(runs["4"] / "av"), "av")
    for row in range(3):
        vectors_KD = torch.from_numpy(task.inputs([row])[0, 2 - row :])
        assert isinstance(verbalise().write(runs["4"] / "av", vectors_KD, 4), str)
    with pytest.raises(MarkerError, match="a prompt for 4 activations"):
        verbalise().write(runs["4"] / "av", torch.ones(4, 64), 4)


def test_the_longest_row_is_that_of_its_own_prompt_and_response(
    base: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    """The rows with the longest responses have the shortest prompts."""
    rows = tiny_rows(64, positions=3, fewest=1)
    counts = [1 + len(each) // 64 for each in rows[columns.PRECEDING]]
    rows[columns.EXPLANATION] = ["about: birds " + "and " * (3 - count) for count in counts]
    table = tiny_table(tmp_path / "av_sft.parquet", base, "av_sft", rows)
    task = NlaTask.open(str(table), "av_sft", str(base))
    lengths = [len(task.prompt_of(row).ids) + len(task.gold_response_ids(row)) for row in range(task.table.n_rows)]
    longest = max(lengths)
    assert longest < len(task.prompt_ids) + max(len(task.gold_response_ids(row)) for row in range(task.table.n_rows))
    words = [word for word in sft("av", base, {**data, "av_sft": table}, tmp_path / "run") if "=" in word]
    check(compose("sft", [*words, f"max_length={longest}"]), 1)
    with pytest.raises(ColumnError, match=f"a row of {longest} tokens"):
        check(compose("sft", [*words, f"max_length={longest - 1}"]), 1)


@pytest.mark.parametrize(
    ("role", "overrides", "kind", "told"),
    [
        ("both", ["ar_data=null"], "ConfigError", "ar_data=None"),
        ("av", ["ar_data=x.parquet"], "ConfigError", "ar_data=x.parquet"),
        ("ar", ["ar_model=x"], "ConfigError", "ar_model=x"),
        ("av", ["ar_loss.kind=cosine"], "ConfigError", "ar_loss"),
        ("av", ["reconstructor.pooling=mean"], "ConfigError", "reconstructor"),
        ("ar", ["reconstructor.pooling=median"], "ConfigError", "reconstructor.pooling='median'"),
        ("ar", ["reconstructor.projection_layers=0"], "ConfigError", "reconstructor.projection_layers=0"),
        ("ar", ["reconstructor.layer=4"], "ConfigError", "reconstructor.layer=4"),
        ("ar", ["ar_loss.kind=huber"], "ConfigError", "ar_loss.kind='huber'"),
        ("ar", ["curriculum.layers=[0]", "curriculum.steps=2"], "ConfigError", "role=ar"),
        ("av", ["curriculum.layers=[4]", "curriculum.steps=2"], "ConfigError", "curriculum.layers=[4]"),
        ("both", ["ar_model=/nowhere"], "MissingFile", "/nowhere"),
        ("both", ["ar_data=/nowhere.parquet"], "MissingFile", "/nowhere.parquet"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(
    role: str, overrides: list[str], kind: str, told: str, base: Path, data: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main(sft(role, base, data, tmp_path / "run", *overrides)) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"{kind}: ") and told in message
    assert not (tmp_path / "run").exists()


def test_an_ar_is_not_started_from_another_kind_of_ar(
    base: Path, data: dict[str, Path], both: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(sft("ar", both / "ar", data, tmp_path / "run", "reconstructor.pooling=max")) == 2
    message = capsys.readouterr().err
    assert message.startswith("SidecarError: ") and "'max'" in message and "'mean'" in message
