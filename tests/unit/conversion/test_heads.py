"""An AR's directory, its sidecar and what is asked for have to speak of the same head."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nla_megatron.config.schema import ArConfig
from nla_megatron.contract.blocks import ReconstructorSpec
from nla_megatron.contract.sidecar import ModelSidecar, model_sidecar_path, read_model_sidecar, write_model_sidecar
from nla_megatron.conversion.heads import head_of, is_reconstructor, reconstructor_shape, resolved_spec
from nla_megatron.conversion.hf import HEAD_FILE, VALUE_HEAD, read_shape
from nla_megatron.conversion.live import load_reconstructor
from nla_megatron.conversion.source import HuggingFaceSide
from nla_megatron.errors import CheckpointError, ConfigError, MissingFile, NlaError, SidecarError, UnsupportedModel
from nla_megatron.parallel.world import World
from nla_megatron.training.export import export
from tests.support.tiny import LAYER, SHAPE, tiny_contract

D = SHAPE.hidden_size
DEEP = ReconstructorSpec("weighted", 2, 0.25, layer=1)
PLAIN = ReconstructorSpec(layer=LAYER)


def exported(base: Path, out: Path, spec: ReconstructorSpec, world: World) -> Path:
    """An AR of that kind with random numbers in its head."""
    assert spec.layer is not None
    model = load_reconstructor(str(base), read_shape(base).truncated(spec.layer + 1), world, "float32", spec)
    assert model.value_head is not None
    with torch.no_grad():
        for parameter in model.value_head.parameters():
            parameter.normal_()
    sidecar = ModelSidecar.from_contract(
        tiny_contract(base), role="ar", stage="sl", base_checkpoint=str(base), d_model=D, layer_index=LAYER,
        reconstructor=spec,
    )  # fmt: skip
    export(model, str(base), out, world, sidecar)
    return out


@pytest.fixture(scope="module")
def deep(base: Path, world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(base, tmp_path_factory.mktemp("ar") / "deep", DEEP, world)


def edited(source: Path, target: Path, spec: ReconstructorSpec | None) -> Path:
    """A copy whose sidecar says another head, or nothing of one."""
    shutil.copytree(source, target)
    write_model_sidecar(target, replace(read_model_sidecar(target), reconstructor=spec))
    return target


@pytest.mark.parametrize(
    "spec",
    [PLAIN, replace(PLAIN, dropout=0.5), DEEP, ReconstructorSpec("mean", layer=LAYER), ReconstructorSpec(layer=3)],
)
def test_an_exported_ar_comes_back_whole(base: Path, tmp_path: Path, world: World, spec: ReconstructorSpec) -> None:
    torch.manual_seed(1)
    out = exported(base, tmp_path / "ar", spec, world)
    found = resolved_spec(out, None, LAYER)
    assert found == spec and read_model_sidecar(out).reconstructor == spec
    again = load_reconstructor(str(out), reconstructor_shape(out, found), world, "float32")
    assert again.spec == spec and again.shape.num_layers == (spec.layer or 0) + 1
    file = out / (VALUE_HEAD if spec.is_plain(LAYER) else HEAD_FILE)
    assert again.value_head is not None
    kept = again.value_head.state_dict()
    for name, tensor in load_file(file).items():
        assert torch.equal(kept.pop(name), tensor)
    assert kept == {}


def test_an_ar_whose_sidecar_says_nothing_of_its_head_is_the_plain_one(
    base: Path, tmp_path: Path, world: World
) -> None:
    """As other trainers write them: read behind the block that the table's activations are of."""
    plain = exported(base, tmp_path / "plain", PLAIN, world)
    told, untold = load_file(plain / VALUE_HEAD), edited(plain, tmp_path / "untold", None)
    spec = resolved_spec(untold, None, LAYER)
    for wanted in (spec, None):
        found = load_reconstructor(str(untold), reconstructor_shape(untold, spec), world, "float32", wanted)
        assert found.value_head is not None and found.spec.is_plain(LAYER)
        assert torch.equal(found.value_head.state_dict()["weight"], told["weight"])


def test_only_the_plain_ar_has_the_head_that_other_trainers_look_for(
    base: Path, deep: Path, tmp_path: Path, world: World
) -> None:
    plain = exported(base, tmp_path / "plain", replace(PLAIN, dropout=0.5), world)
    assert set(load_file(plain / VALUE_HEAD)) == {"weight"} and not (plain / HEAD_FILE).exists()
    assert (deep / HEAD_FILE).is_file() and not (deep / VALUE_HEAD).exists()


def refusal(kind: type[NlaError], directory: Path, wanted: ReconstructorSpec | None = None) -> str:
    with pytest.raises(kind) as caught:
        reconstructor_shape(directory, resolved_spec(directory, wanted, LAYER))
    assert type(caught.value) is kind
    return str(caught.value)


@pytest.mark.parametrize(
    ("changed", "kind", "told"),
    [
        (replace(DEEP, pooling="mean"), CheckpointError, "position_logits"),
        (replace(DEEP, projection_layers=1), CheckpointError, "hidden.0"),
        (replace(DEEP, projection_layers=3), CheckpointError, "hidden.1"),
        (replace(DEEP, layer=2), SidecarError, "2 blocks"),
        (replace(DEEP, layer=0), SidecarError, "block 0"),
        (ReconstructorSpec(layer=LAYER), SidecarError, "2 blocks"),
    ],
)
def test_a_sidecar_that_says_another_head_than_the_files_is_refused(
    deep: Path, tmp_path: Path, changed: ReconstructorSpec, kind: type[NlaError], told: str
) -> None:
    assert told in refusal(kind, edited(deep, tmp_path / "ar", changed))


def test_a_plain_head_under_another_pooling_is_refused(base: Path, tmp_path: Path, world: World) -> None:
    plain = exported(base, tmp_path / "plain", PLAIN, world)
    wrong = edited(plain, tmp_path / "wrong", replace(PLAIN, pooling="mean"))
    assert HEAD_FILE in refusal(CheckpointError, wrong)


def test_both_heads_or_none_are_refused(deep: Path, tmp_path: Path) -> None:
    both = Path(shutil.copytree(deep, tmp_path / "both"))
    save_file({"weight": torch.eye(D)}, both / VALUE_HEAD)
    assert VALUE_HEAD in refusal(CheckpointError, both)
    none = Path(shutil.copytree(deep, tmp_path / "none"))
    (none / HEAD_FILE).unlink()
    assert HEAD_FILE in refusal(MissingFile, none)


def test_an_ar_is_not_trained_on_as_another(deep: Path) -> None:
    assert "pooling='max'" in refusal(SidecarError, deep, replace(DEEP, pooling="max"))
    assert resolved_spec(deep, replace(DEEP, dropout=0.0)).dropout == 0.0, "dropout is no weight"


def test_a_block_that_the_base_lacks_is_refused(base: Path) -> None:
    message = refusal(ConfigError, base, ReconstructorSpec(layer=4))
    assert "reconstructor.layer=4" in message and "0 to 3" in message


def test_a_base_model_has_no_head_and_any_way_of_reading(base: Path) -> None:
    assert not is_reconstructor(base)
    assert resolved_spec(base, None, LAYER) == PLAIN and resolved_spec(base, DEEP, LAYER) == DEEP
    assert head_of(base, read_shape(base), DEEP) is None


def test_conversion_refuses_a_head_that_it_would_lose(deep: Path) -> None:
    with pytest.raises(UnsupportedModel, match=HEAD_FILE):
        HuggingFaceSide(deep)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("pooling", "median", "reconstructor.pooling"),
        ("projection_layers", 0, "reconstructor.projection_layers"),
        ("dropout", 1.0, "reconstructor.dropout"),
        ("layer", -1, "reconstructor.layer"),
        ("heads", 3, "reconstructor.heads"),
    ],
)
def test_a_malformed_record_of_the_head_is_refused(
    deep: Path, tmp_path: Path, key: str, value: object, told: str
) -> None:
    import yaml

    directory = Path(shutil.copytree(deep, tmp_path / "ar"))
    path = model_sidecar_path(directory)
    raw = yaml.safe_load(path.read_text())
    raw["reconstructor"][key] = value
    path.write_text(json.dumps(raw))
    with pytest.raises(SidecarError, match=told):
        read_model_sidecar(directory)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"pooling": "median"}, "reconstructor.pooling='median'"),
        ({"projection_layers": 0}, "reconstructor.projection_layers=0"),
        ({"dropout": 1.0}, "reconstructor.dropout=1.0"),
        ({"layer": -1}, "reconstructor.layer=-1"),
    ],
)
def test_a_configured_head_that_cannot_be_is_refused(options: dict[str, object], found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ArConfig(**options)  # type: ignore[arg-type]
    assert caught.value.found == found
