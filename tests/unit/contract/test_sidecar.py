from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from nla_megatron.contract.markers import several_markers
from nla_megatron.contract.prompts import AR_TEMPLATE, AV_TEMPLATE, PromptContract
from nla_megatron.contract.sidecar import (
    ApiSummaries,
    CorpusSlice,
    DatasetExtraction,
    DatasetSidecar,
    InjectionSpec,
    ModelSidecar,
    PoolSpec,
    ProjectionSpec,
    ReconstructorSpec,
    check_dataset,
    dataset_sidecar_path,
    model_sidecar_path,
    prompt_contract,
    read_dataset_sidecar,
    read_model_sidecar,
    write_dataset_sidecar,
    write_model_sidecar,
)
from nla_megatron.errors import MarkerError, MissingFile, SidecarError, WidthError

Tok = PreTrainedTokenizerFast
EXTRACTION = DatasetExtraction("org/base", 16, 3, "corpus", CorpusSlice(0, 100), 10)
INJECTION = InjectionSpec("norm_add", 1, 1.0)

# The keys that a strict reader of these nested blocks knows; one more and it stops.
TOKEN_KEYS = {
    "injection_char",
    "injection_token_id",
    "injection_left_neighbor_id",
    "injection_right_neighbor_id",
    "critic_suffix_ids",
}
STRICT = {
    "extraction": {"base_model", "d_model", "layer_index", "norm", "corpus", "corpus_slice", "positions_per_doc"},
    "tokens": TOKEN_KEYS,
    "api_summaries": {"model", "max_tokens", "temperature", "instruction_prompt"},
}
TOP = {"dataset_id", "stage", "row_count", "kind", "schema_version", "keep_debug_metadata", "prompt_templates"}
TOP |= {"parent_datasets", "created_at", "created_by", "git_commit", *STRICT}


@pytest.fixture(scope="module")
def contract(tokenizer: Tok) -> PromptContract:
    return PromptContract.derive(tokenizer, AV_TEMPLATE, AR_TEMPLATE)


@pytest.fixture
def dataset(contract: PromptContract) -> DatasetSidecar:
    return DatasetSidecar.from_contract(
        contract,
        stage="rl",
        row_count=7,
        extraction=EXTRACTION,
        injection=INJECTION,
        api_summaries=ApiSummaries("m", 300, 1.0, "Name two\nfeatures: {text}"),
        parent_datasets=("base_1", "base_2"),
    )


@pytest.fixture
def model(contract: PromptContract) -> ModelSidecar:
    return ModelSidecar.from_contract(
        contract,
        role="av",
        stage="sl",
        base_checkpoint="org/base",
        d_model=16,
        layer_index=3,
        injection=INJECTION,
        trained_on=("av_sft_1",),
        training={"lr": 2e-5, "steps": 10, "nested": {"a": [1, 2]}},
    )


@pytest.fixture
def parquet(tmp_path: Path, dataset: DatasetSidecar) -> Path:
    write_dataset_sidecar(tmp_path / "rl.parquet", dataset)
    return tmp_path / "rl.parquet"


@pytest.fixture
def checkpoint(tmp_path: Path, model: ModelSidecar) -> Path:
    write_model_sidecar(tmp_path / "av", model)
    return tmp_path / "av"


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = yaml.safe_load(path.read_text())
    change(raw)
    path.write_text(yaml.safe_dump(raw, allow_unicode=True))


def test_a_dataset_sidecar_comes_back_as_written(tmp_path: Path, dataset: DatasetSidecar) -> None:
    written = write_dataset_sidecar(tmp_path / "rl.parquet", dataset)
    assert read_dataset_sidecar(tmp_path / "rl.parquet") == written
    assert replace(written, dataset_id="", created_at="", git_commit="") == dataset
    assert [path.name for path in tmp_path.iterdir()] == ["rl.parquet.nla_meta.yaml"]


def test_a_base_sidecar_needs_no_prompts(tmp_path: Path) -> None:
    written = write_dataset_sidecar(tmp_path / "b.parquet", DatasetSidecar("base", 3, EXTRACTION))
    assert read_dataset_sidecar(tmp_path / "b.parquet") == written
    with pytest.raises(SidecarError, match="'tokens'"):
        prompt_contract(written)


def test_a_model_sidecar_comes_back_as_written(tmp_path: Path, model: ModelSidecar) -> None:
    written = write_model_sidecar(tmp_path / "new" / "av", model)
    assert read_model_sidecar(tmp_path / "new" / "av") == written
    assert written.extraction.layer_index == 3
    assert written.training == {"lr": 2e-5, "steps": 10, "nested": {"a": [1, 2]}}


def test_the_dataset_layout_is_what_strict_readers_know(parquet: Path) -> None:
    raw = yaml.safe_load(dataset_sidecar_path(parquet).read_text())
    assert raw["kind"] == "nla_dataset"
    assert raw["schema_version"] == 1
    for block, keys in STRICT.items():
        assert set(raw[block]) == keys
    assert raw["extraction"]["norm"] == "none"
    assert raw["extraction"]["corpus_slice"] == {"start": 0, "length": 100}
    assert set(raw) == TOP | {"injection", "bos_policy", "av_prompt"}
    assert raw["injection"] == {"method": "norm_add", "layer": 1, "scale": 1.0}
    assert set(raw["prompt_templates"]) == {"actor", "critic"}


def test_the_model_layout_is_what_other_readers_know(checkpoint: Path, model: ModelSidecar) -> None:
    raw = yaml.safe_load(model_sidecar_path(checkpoint).read_text())
    assert (raw["kind"], raw["schema_version"], raw["role"]) == ("nla_model", 2, "av")
    assert set(raw["tokens"]) == TOKEN_KEYS
    assert set(raw["prompt_templates"]) == {"av", "ar"}
    assert raw["extraction"] == {"layer_index": 3, "injection_scale": None, "mse_scale": 4.0}  # √16: a number
    assert raw["critic"] == {"extraction_layer_index": 3}
    assert raw["bos_policy"] == "none"


def test_only_replace_gives_other_readers_an_injection_scale(contract: PromptContract) -> None:
    fields: dict[str, Any] = {"stage": "sl", "base_checkpoint": "b", "d_model": 16, "layer_index": 3}
    for method, expected in (("replace", 150.0), ("norm_add", None), ("add", None)):
        injection = InjectionSpec(method, 1, 150.0)
        sidecar = ModelSidecar.from_contract(contract, role="av", injection=injection, **fields)
        assert sidecar.extraction.injection_scale == expected


def test_the_av_template_in_the_file_formats_to_the_prompt(tmp_path: Path, tokenizer: Tok) -> None:
    """Other readers fill the template with `str.format`, so literal braces are doubled in the file."""
    template = "Weigh {this} and }{ that: <concept><INJECT></concept>"
    contract = PromptContract.derive(tokenizer, template, "{{x}} {explanation} the end")
    sidecar = DatasetSidecar.from_contract(contract, stage="av_sft", row_count=1, extraction=EXTRACTION)
    write_dataset_sidecar(tmp_path / "t.parquet", sidecar)
    raw = yaml.safe_load(dataset_sidecar_path(tmp_path / "t.parquet").read_text())["prompt_templates"]
    assert raw["actor"].format(injection_char="㈎") == template.replace("<INJECT>", "㈎")
    assert raw["critic"].format(explanation="e") == "{x} e the end"
    assert prompt_contract(read_dataset_sidecar(tmp_path / "t.parquet")) == contract


def test_the_contract_survives_both_sidecars(parquet: Path, checkpoint: Path, contract: PromptContract) -> None:
    assert prompt_contract(read_dataset_sidecar(parquet)) == contract
    assert prompt_contract(read_model_sidecar(checkpoint)) == contract


def test_time_commit_and_id_are_filled_in(dataset: DatasetSidecar, tmp_path: Path) -> None:
    first = write_dataset_sidecar(tmp_path / "a.parquet", dataset)
    second = write_dataset_sidecar(tmp_path / "b.parquet", replace(dataset, created_at="2026-01-01T00:00:00+00:00"))
    other = write_dataset_sidecar(tmp_path / "c.parquet", replace(dataset, row_count=8))
    given = write_dataset_sidecar(tmp_path / "d.parquet", replace(dataset, dataset_id="mine"))
    assert datetime.fromisoformat(first.created_at).tzinfo is not None
    assert first.dataset_id == second.dataset_id
    assert first.dataset_id.startswith("rl_")
    assert first.dataset_id != other.dataset_id
    assert given.dataset_id == "mine"
    assert second.created_at == "2026-01-01T00:00:00+00:00"


def test_a_missing_sidecar_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"rl\.parquet\.nla_meta\.yaml"):
        read_dataset_sidecar(tmp_path / "rl.parquet")
    with pytest.raises(MissingFile, match=r"nla_meta\.yaml"):
        read_model_sidecar(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not readable YAML"), ("- 1", "holds"), ("", "holds None"), ("\x00", "YAML")]
)
def test_a_malformed_sidecar_is_named(tmp_path: Path, text: str, message: str) -> None:
    dataset_sidecar_path(tmp_path / "t.parquet").write_text(text)
    with pytest.raises(SidecarError, match=message):
        read_dataset_sidecar(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda raw: raw["extraction"].update(extra=1), "unknown key 'extraction.extra'"),
        (lambda raw: raw["extraction"]["corpus_slice"].update(step=1), "unknown key 'extraction.corpus_slice.step'"),
        (lambda raw: raw["tokens"].update(extra=1), "unknown key 'tokens.extra'"),
        (lambda raw: raw["injection"].update(extra=1), "unknown key 'injection.extra'"),
        (lambda raw: raw["prompt_templates"].update(judge="x"), "unknown key 'prompt_templates.judge'"),
        (lambda raw: raw["tokens"].pop("injection_token_id"), "no key 'tokens.injection_token_id'"),
        (lambda raw: raw.pop("extraction"), "no key 'extraction'"),
        (lambda raw: raw.pop("tokens"), "no key 'tokens'"),
        (lambda raw: raw.pop("prompt_templates"), "no key 'prompt_templates'"),
        (lambda raw: raw.update(row_count="7"), "'row_count' in"),
        (lambda raw: raw.update(row_count=True), "'row_count' in"),
        (lambda raw: raw["tokens"].update(critic_suffix_ids=[1, "2"]), r"'tokens.critic_suffix_ids\[1\]' in"),
        (lambda raw: raw.update(extraction=[1]), "'extraction' in"),
        (lambda raw: raw["extraction"].update(norm="l2"), "'extraction.norm' in"),
        (lambda raw: raw.update(stage="sft"), "'stage' in"),
        (lambda raw: raw.update(bos_policy="always"), "'bos_policy' in"),
        (lambda raw: raw.update(kind="nla_model"), "'kind' in"),
        (lambda raw: raw.update(schema_version=3), "'schema_version' in"),
        (lambda raw: raw["prompt_templates"].update(actor="no marker"), "AV template"),
        (lambda raw: raw["prompt_templates"].update(actor="{injection_char} {other}"), "AV template"),
    ],
)
def test_a_bad_key_of_a_dataset_sidecar_is_named(parquet: Path, change: Callable[..., object], key: str) -> None:
    edit(dataset_sidecar_path(parquet), change)
    with pytest.raises(SidecarError, match=key):
        read_dataset_sidecar(parquet)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda raw: raw["extraction"].update(extra=1), "unknown key 'extraction.extra'"),
        (lambda raw: raw.update(role="judge"), "'role' in"),
        (lambda raw: raw.update(stage="base"), "'stage' in"),
        (lambda raw: raw.pop("d_model"), "no key 'd_model'"),
        (lambda raw: raw.pop("tokens"), "no key 'tokens'"),
        (lambda raw: raw.update(extraction=3), "'extraction' in"),
        (lambda raw: raw["critic"].update(extraction_layer_index=4), "several block indices"),
        (lambda raw: raw.update(kind="nla_judge"), "'kind' in"),
    ],
)
def test_a_bad_key_of_a_model_sidecar_is_named(checkpoint: Path, change: Callable[..., object], key: str) -> None:
    edit(model_sidecar_path(checkpoint), change)
    with pytest.raises(SidecarError, match=key):
        read_model_sidecar(checkpoint)


def test_unknown_keys_at_the_top_are_other_peoples_extensions(parquet: Path) -> None:
    before = read_dataset_sidecar(parquet)
    edit(dataset_sidecar_path(parquet), lambda raw: raw.update(their_note={"a": 1}))
    assert read_dataset_sidecar(parquet) == before


@pytest.mark.parametrize(("theirs", "ours"), [("actor", "av"), ("critic", "ar")])
def test_a_model_sidecar_of_another_trainer_is_read(checkpoint: Path, theirs: str, ours: str) -> None:
    def as_theirs(raw: dict[str, Any]) -> None:
        templates = raw["prompt_templates"]
        raw.update(role=theirs, schema_version=1, critic={"num_hidden_layers": 3})
        raw["prompt_templates"] = {"actor": templates["av"], "critic": templates["ar"]}
        raw["extraction"] = {"injection_scale": 150.0, "mse_scale": 4.0}
        del raw["bos_policy"], raw["injection"]

    edit(model_sidecar_path(checkpoint), as_theirs)
    sidecar = read_model_sidecar(checkpoint)
    assert sidecar.role == ours
    assert sidecar.extraction.layer_index == 3
    assert sidecar.prompt_templates.av == AV_TEMPLATE
    with pytest.raises(SidecarError, match="'bos_policy'"):  # AR prompts with or without BOS: the file does not say
        prompt_contract(sidecar)


def test_what_our_own_files_must_say_is_asked_for_when_writing(
    tmp_path: Path, dataset: DatasetSidecar, model: ModelSidecar
) -> None:
    with pytest.raises(SidecarError, match="'bos_policy'"):
        write_dataset_sidecar(tmp_path / "t.parquet", replace(dataset, bos_policy=None))
    with pytest.raises(SidecarError, match="'tokens'"):
        write_dataset_sidecar(tmp_path / "t.parquet", DatasetSidecar("rl", 1, EXTRACTION))
    with pytest.raises(SidecarError, match="'stage'"):
        write_dataset_sidecar(tmp_path / "t.parquet", replace(dataset, stage="explained"))
    with pytest.raises(SidecarError, match="'injection'"):
        write_model_sidecar(tmp_path, replace(model, injection=None))
    with pytest.raises(SidecarError, match="'bos_policy'"):
        write_model_sidecar(tmp_path, replace(model, bos_policy=None))
    assert list(tmp_path.iterdir()) == []


def test_the_check_of_a_dataset_names_both_values(
    dataset: DatasetSidecar, tokenizer: Tok, other_tokenizer: Tok, split_marker_tokenizer: Tok
) -> None:
    check_dataset(dataset, d_model=16, layer_index=3, tokenizer=tokenizer)
    with pytest.raises(WidthError) as width:
        check_dataset(dataset, d_model=32, layer_index=3, tokenizer=tokenizer)
    assert "16" in width.value.found
    assert "32" in width.value.expected
    with pytest.raises(SidecarError) as layer:
        check_dataset(dataset, d_model=16, layer_index=5, tokenizer=tokenizer)
    assert "block 3" in layer.value.found
    assert "block 5" in layer.value.expected
    with pytest.raises(SidecarError, match="marker_id"):
        check_dataset(dataset, d_model=16, layer_index=3, tokenizer=other_tokenizer)
    with pytest.raises(MarkerError):
        check_dataset(dataset, d_model=16, layer_index=3, tokenizer=split_marker_tokenizer)
    base = DatasetSidecar("base", 3, EXTRACTION)
    check_dataset(base, d_model=16, layer_index=3, tokenizer=split_marker_tokenizer)


def test_extensions_come_back_and_stand_where_other_readers_pass_over_them(tmp_path: Path, tokenizer: Tok) -> None:
    contract = PromptContract.derive(tokenizer, several_markers(AV_TEMPLATE, 2), positions=2)
    extraction = DatasetExtraction("base", 64, 2, "corpus", CorpusSlice(0, 4), 3)
    dataset = DatasetSidecar.from_contract(
        contract, stage="rl", row_count=1, extraction=extraction, pool=PoolSpec("mean", 4),
        injection=InjectionSpec("add", 1, 0.5, (1, 3)),
    )  # fmt: skip
    written = write_dataset_sidecar(tmp_path / "rl.parquet", dataset)
    assert read_dataset_sidecar(tmp_path / "rl.parquet") == written
    model = ModelSidecar.from_contract(
        contract, role="ar", stage="sl", base_checkpoint="base", d_model=64, layer_index=2, pool=PoolSpec("mean", 4),
        reconstructor=ReconstructorSpec("weighted", 2, 0.1, 1),
    )  # fmt: skip
    found = read_model_sidecar(write_model_sidecar(tmp_path, model) and tmp_path)
    assert (found.pool, found.reconstructor) == (model.pool, model.reconstructor)
    for path in (dataset_sidecar_path(tmp_path / "rl.parquet"), model_sidecar_path(tmp_path)):
        raw = yaml.safe_load(path.read_text())
        assert raw["pool"] == {"method": "mean", "window": 4}
        assert not {"pool", "reconstructor", "layers"} & {*raw["extraction"], *raw["tokens"], *raw["prompt_templates"]}


@pytest.mark.parametrize("injection", [InjectionSpec("add", 1, 0.5, (2, 1)), InjectionSpec("add", 1, 0.5, (1, 1))])
def test_blocks_that_contradict_each_other_are_refused(
    tmp_path: Path, tokenizer: Tok, injection: InjectionSpec
) -> None:
    extraction = DatasetExtraction("base", 64, 2, "corpus", CorpusSlice(0, 4), 3)
    sidecar = DatasetSidecar.from_contract(
        PromptContract.derive(tokenizer), stage="rl", row_count=1, extraction=extraction, injection=injection
    )
    with pytest.raises(SidecarError, match=r"injection.layers"):
        write_dataset_sidecar(tmp_path / "rl.parquet", sidecar)


PROJECT = InjectionSpec("project", 1, 0.5, None, ProjectionSpec("add", 2, 0.1))


def injecting(tokenizer: Tok, injection: InjectionSpec) -> DatasetSidecar:
    extraction = DatasetExtraction("base", 64, 2, "corpus", CorpusSlice(0, 4), 3)
    return DatasetSidecar.from_contract(
        PromptContract.derive(tokenizer), stage="rl", row_count=1, extraction=extraction, injection=injection
    )


def test_a_projection_comes_back_and_other_methods_say_nothing_of_it(tmp_path: Path, tokenizer: Tok) -> None:
    for name, injection in {"project": PROJECT, "add": InjectionSpec("add", 1, 0.5)}.items():
        written = write_dataset_sidecar(tmp_path / name, injecting(tokenizer, injection))
        assert read_dataset_sidecar(tmp_path / name) == written and written.injection == injection
    raw = {name: yaml.safe_load(dataset_sidecar_path(tmp_path / name).read_text()) for name in ("project", "add")}
    assert raw["project"]["injection"] == {
        "method": "project", "layer": 1, "scale": 0.5, "projection": {"then": "add", "layers": 2, "dropout": 0.1},
    }  # fmt: skip
    assert list(raw["add"]["injection"].items()) == [("method", "add"), ("layer", 1), ("scale", 0.5)]


@pytest.mark.parametrize(
    ("injection", "key"),
    [
        (replace(PROJECT, projection=None), "projection None"),
        (replace(PROJECT, method="add"), "method 'add'"),
        (replace(PROJECT, projection=ProjectionSpec("project")), "injection.projection.then"),
        (replace(PROJECT, projection=ProjectionSpec(layers=0)), "injection.projection.layers"),
        (replace(PROJECT, projection=ProjectionSpec(layers=2, dropout=1.0)), "injection.projection.dropout"),
        (replace(PROJECT, projection=ProjectionSpec(dropout=0.5)), "of a single layer"),
    ],
)
def test_a_projection_that_cannot_be_is_refused(
    tmp_path: Path, tokenizer: Tok, injection: InjectionSpec, key: str
) -> None:
    with pytest.raises(SidecarError) as caught:
        write_dataset_sidecar(tmp_path / "rl.parquet", injecting(tokenizer, injection))
    assert key in caught.value.found


def stacked(tokenizer: Tok, pool: PoolSpec, markers: int) -> DatasetSidecar:
    contract = PromptContract.derive(tokenizer, several_markers(AV_TEMPLATE, markers), positions=markers)
    extraction = DatasetExtraction("base", 64, 2, "corpus", CorpusSlice(0, 4), 3)
    return DatasetSidecar.from_contract(
        contract, stage="rl", row_count=1, extraction=extraction, pool=pool, injection=InjectionSpec("add", 1, 0.5)
    )


def test_a_sidecar_says_how_many_activations_a_row_keeps(tmp_path: Path, tokenizer: Tok) -> None:
    written = write_dataset_sidecar(tmp_path / "rl.parquet", stacked(tokenizer, PoolSpec("stack", 3), 3))
    found = read_dataset_sidecar(tmp_path / "rl.parquet")
    assert found == written and PoolSpec.positions_of(found.pool) == 3
    assert PoolSpec.positions_of(PoolSpec("mean", 3)) == PoolSpec.positions_of(None) == 1


@pytest.mark.parametrize(
    ("pool", "markers", "told"),
    [
        (PoolSpec("stack", 1), 1, "'pool.window'"),
        (PoolSpec("stack", 3), 1, "has 1 markers for 'pool.window' = 3 activations"),
        (PoolSpec("stack", 2), 3, "has 3 markers for 'pool.window' = 2 activations"),
        (PoolSpec("max", 2), 1, "'pool.method'"),
    ],
)
def test_activations_without_a_marker_each_are_refused(
    tmp_path: Path, tokenizer: Tok, pool: PoolSpec, markers: int, told: str
) -> None:
    sidecar, path = stacked(tokenizer, pool, markers), tmp_path / "rl.parquet"
    with pytest.raises(SidecarError) as caught:
        write_dataset_sidecar(path, sidecar)
    assert told in caught.value.found
    write_dataset_sidecar(path, replace(sidecar, pool=PoolSpec("mean", 2)))
    text = dataset_sidecar_path(path).read_text()
    assert "method: mean\n  window: 2" in text
    edited = text.replace("method: mean\n  window: 2", f"method: {pool.method}\n  window: {pool.window}")
    dataset_sidecar_path(path).write_text(edited)
    with pytest.raises(SidecarError) as caught:
        read_dataset_sidecar(path)
    assert told in caught.value.found


def varying(tokenizer: Tok, pool: PoolSpec) -> DatasetSidecar:
    contract = PromptContract.derive(tokenizer, repeats=PoolSpec.bounds_of(pool))
    extraction = DatasetExtraction("base", 64, 2, "corpus", CorpusSlice(0, 4), 3)
    return DatasetSidecar.from_contract(
        contract, stage="rl", row_count=1, extraction=extraction, pool=pool, injection=InjectionSpec("add", 1, 0.5)
    )


@pytest.mark.parametrize("pool", [PoolSpec("stack", 3, 1), PoolSpec("stack", 8, 2, "sentence")])
def test_bounds_on_a_row_s_activations_are_part_of_the_contract(tmp_path: Path, tokenizer: Tok, pool: PoolSpec) -> None:
    sidecar = varying(tokenizer, pool)
    written = write_dataset_sidecar(tmp_path / "rl.parquet", sidecar)
    found = read_dataset_sidecar(tmp_path / "rl.parquet")
    assert found == written and PoolSpec.positions_of(found.pool) == pool.window
    contract = prompt_contract(found)
    assert contract.repeats == (pool.least, pool.window)
    contract.check(tokenizer)
    model = ModelSidecar.from_contract(
        contract, role="av", stage="sl", base_checkpoint="base", d_model=64, layer_index=2, pool=pool,
        injection=InjectionSpec("add", 1, 0.5),
    )  # fmt: skip
    write_model_sidecar(tmp_path, model)
    assert prompt_contract(read_model_sidecar(tmp_path)) == contract


def test_a_fixed_number_of_activations_is_written_as_before(tmp_path: Path, tokenizer: Tok) -> None:
    write_dataset_sidecar(tmp_path / "rl.parquet", stacked(tokenizer, PoolSpec("stack", 3), 3))
    raw = yaml.safe_load(dataset_sidecar_path(tmp_path / "rl.parquet").read_text())
    assert raw["pool"] == {"method": "stack", "window": 3}


@pytest.mark.parametrize(
    ("pool", "told"),
    [
        (PoolSpec("stack", 3, 0), "'pool.least' in"),
        (PoolSpec("stack", 3, 3), "is 3, with method 'stack' and window 3"),
        (PoolSpec("mean", 3, 1), "with method 'mean'"),
        (PoolSpec("stack", 3, 1, "line"), "'pool.within' in"),
        (PoolSpec("mean", 3, None, "sentence"), "'pool.within' in"),
    ],
)
def test_bounds_that_cannot_be_meant_are_refused(tmp_path: Path, tokenizer: Tok, pool: PoolSpec, told: str) -> None:
    sidecar = replace(varying(tokenizer, PoolSpec("stack", 3, 1)), pool=pool)
    with pytest.raises(SidecarError) as caught:
        write_dataset_sidecar(tmp_path / "rl.parquet", sidecar)
    assert told in caught.value.found


def test_a_template_of_several_markers_does_not_go_with_bounds(tmp_path: Path, tokenizer: Tok) -> None:
    sidecar = replace(stacked(tokenizer, PoolSpec("stack", 3), 3), pool=PoolSpec("stack", 3, 1))
    with pytest.raises(SidecarError, match=r"has 3 markers for rows of 1 to 3 activations"):
        write_dataset_sidecar(tmp_path / "rl.parquet", sidecar)
