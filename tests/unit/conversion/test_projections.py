"""An AV's directory, its sidecar and the table's injection have to speak of the same projections."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nla_megatron.contract.sidecar import (
    InjectionSpec,
    ModelSidecar,
    ProjectionSpec,
    model_sidecar_path,
    read_dataset_sidecar,
    read_model_sidecar,
    write_dataset_sidecar,
)
from nla_megatron.conversion.artefacts import Told, adopt
from nla_megatron.conversion.hf import SafetensorsReader, read_shape
from nla_megatron.conversion.projections import (
    PROJECTION_FILE,
    check_projections,
    load_projections,
    read_projections,
)
from nla_megatron.errors import CheckpointError, MissingFile
from nla_megatron.interventions.spec import Intervention
from nla_megatron.models.interventions import intervene
from nla_megatron.models.projections import projections_of
from nla_megatron.models.verbalizer import build_verbalizer
from nla_megatron.parallel.world import World
from nla_megatron.tasks.nla import NlaTask
from nla_megatron.training.export import export
from tests.support.adapters import peft_adapter
from tests.support.ranks import command
from tests.support.tiny import LAYER, SHAPE, tiny_contract, tiny_table

D = SHAPE.hidden_size
SPEC = InjectionSpec("project", 0, 2.0, (0, 2), ProjectionSpec("add", 2, 0.25))
WANTED = tuple(Intervention(block, "project", strength=2.0, then="add", projection_layers=2) for block in (0, 2))


def av_of(base: Path, world: World, interventions: tuple[Intervention, ...] = WANTED, seed: int = 0) -> Any:
    model = build_verbalizer(read_shape(base), world, "bfloat16")
    intervene(model, interventions, seed)
    return model


@pytest.fixture(scope="module")
def av(base: Path, world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported AV with random projections at two blocks."""
    model, out = av_of(base, world), tmp_path_factory.mktemp("av") / "av"
    with torch.no_grad():
        for parameter in model.projections.parameters():
            parameter.normal_()
    sidecar = ModelSidecar.from_contract(
        tiny_contract(base), role="av", stage="sl", base_checkpoint=str(base), d_model=D, layer_index=LAYER,
        injection=SPEC,
    )  # fmt: skip
    export(model, str(base), out, world, sidecar)
    kept = {f"{number}.{name}": each for number, one in projections_of(model).items()
            for name, each in one.state_dict().items()}  # fmt: skip
    found = load_file(out / PROJECTION_FILE)
    assert found.keys() == kept.keys() and all(torch.equal(found[name], kept[name]) for name in kept)
    return out


@pytest.fixture(scope="module")
def table(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tiny_table(tmp_path_factory.mktemp("data") / "rl.parquet", base, "rl")
    write_dataset_sidecar(data, replace(read_dataset_sidecar(data), injection=SPEC))
    return data


def test_an_exported_projection_comes_back_whole(base: Path, av: Path, world: World) -> None:
    model, found = av_of(base, world), read_projections(av, WANTED, D)
    load_projections(model, str(av))
    assert set(found) == set(projections_of(model)) == {0, 1}
    tensors = load_file(av / PROJECTION_FILE)
    for number, projection in projections_of(model).items():
        for name, tensor in projection.state_dict().items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, tensors[f"{number}.{name}"])
            assert torch.equal(tensor, found[number].state_dict()[name])


def test_whoever_reads_all_weights_of_the_directory_sees_those_of_the_language_model(base: Path, av: Path) -> None:
    assert [path.name for path in av.glob("*.safetensors")] == ["model.safetensors"]
    assert SafetensorsReader(av).names() == SafetensorsReader(base).names()
    _, told = AutoModelForCausalLM.from_pretrained(av, output_loading_info=True)
    assert not any(told.values())


def test_a_base_model_starts_afresh_by_the_seed(base: Path, world: World) -> None:
    def first(seed: int) -> torch.Tensor:
        model = av_of(base, world, seed=seed)
        load_projections(model, str(base))
        return model.projections["0"].linears[0].weight

    assert read_projections(base, WANTED, D) == {}
    assert torch.equal(first(3), first(3)) and not torch.equal(first(3), first(4))


def test_a_table_opens_with_its_av_and_with_a_base_model(base: Path, av: Path, table: Path) -> None:
    task = NlaTask.open(str(table), "rl", str(av))
    assert task.interventions == WANTED and task.projection_dropout == 0.25
    assert task.check_model(str(av), "av").injection == SPEC
    assert NlaTask.open(str(table), "rl", str(base)).interventions == WANTED


def test_an_av_without_the_projection_of_its_sidecar_is_refused(av: Path, table: Path, tmp_path: Path) -> None:
    shutil.copytree(av, tmp_path / "av")
    (tmp_path / "av" / PROJECTION_FILE).unlink()
    with pytest.raises(MissingFile, match=str(PROJECTION_FILE)):
        NlaTask.open(str(table), "rl", str(tmp_path / "av"))


@pytest.mark.parametrize(
    ("interventions", "width", "told"),
    [
        (WANTED, 32, "(64, 64)"),
        (WANTED[:1], D, "1.linears.0.weight"),
        (tuple(replace(each, projection_layers=1) for each in WANTED), D, "0.linears.1.weight"),
        (tuple(replace(each, vector_width=48) for each in WANTED), D, "(64, 48)"),
    ],
)
def test_projections_of_another_kind_are_refused(
    av: Path, interventions: tuple[Intervention, ...], width: int, told: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_projections(av, interventions, width)
    assert told in caught.value.found + caught.value.expected


def test_a_damaged_file_is_refused_before_the_run(av: Path, table: Path, tmp_path: Path) -> None:
    shutil.copytree(av, tmp_path / "av")
    file = tmp_path / "av" / PROJECTION_FILE
    tensors = load_file(file)
    save_file({name: each for name, each in tensors.items() if name != "1.norms.0.bias"}, file)
    with pytest.raises(CheckpointError, match=r"1\.norms\.0\.bias"):
        NlaTask.open(str(table), "rl", str(tmp_path / "av"))
    file.write_bytes(b"no tensors")
    with pytest.raises(CheckpointError):
        NlaTask.open(str(table), "rl", str(tmp_path / "av"))


def test_a_table_without_a_projection_leaves_that_of_the_av_alone(av: Path) -> None:
    assert check_projections(av, (Intervention(1, "add"),), D) is None


def test_conversions_carry_it_along(av: Path, tmp_path: Path) -> None:
    for words in (
        ("import", f"hf={av}", f"out={tmp_path / 'mcore'}"),
        ("export", f"checkpoint={tmp_path / 'mcore'}", f"out={tmp_path / 'back'}"),
    ):
        done = command("convert", *words)
        assert done.returncode == 0, done.stderr
    adopt(av, tmp_path / "adopted", Told())
    wanted = load_file(av / PROJECTION_FILE)
    for name in ("mcore", "back", "adopted"):
        found = load_file(tmp_path / name / PROJECTION_FILE)
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
        assert read_model_sidecar(tmp_path / name).injection == SPEC


def test_an_adapter_brings_it_to_its_base(av: Path, base: Path, tmp_path: Path) -> None:
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    peft_adapter(base, tmp_path / "adapter", options, seed=1)
    shutil.copytree(av / PROJECTION_FILE.parent, tmp_path / "adapter" / PROJECTION_FILE.parent)
    shutil.copyfile(model_sidecar_path(av), model_sidecar_path(tmp_path / "adapter"))
    adopt(tmp_path / "adapter", tmp_path / "whole", Told(), base=base)
    wanted, found = load_file(av / PROJECTION_FILE), load_file(tmp_path / "whole" / PROJECTION_FILE)
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert read_model_sidecar(tmp_path / "whole").injection == SPEC


def test_other_trainers_find_no_scale_and_refuse_it(av: Path) -> None:
    assert read_model_sidecar(av).extraction.injection_scale is None
