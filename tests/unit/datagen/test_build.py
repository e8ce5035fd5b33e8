"""One explained table becomes four, split by document, each with its columns and a complete sidecar."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nla_megatron.config.schema import BuildConfig, InterventionConfig, ProjectionConfig, TemplateConfig
from nla_megatron.contract import columns
from nla_megatron.contract.baseline import read_baseline
from nla_megatron.contract.prompts import INJECT
from nla_megatron.contract.sidecar import (
    InjectionSpec,
    PoolSpec,
    ProjectionSpec,
    prompt_contract,
    read_dataset_sidecar,
    write_dataset_sidecar,
)
from nla_megatron.contract.tables import Table
from nla_megatron.contract.tokenizer import load_tokenizer
from nla_megatron.datagen import build
from nla_megatron.errors import ColumnError, ConfigError, MissingFile, NlaError, SidecarError, WidthError
from nla_megatron.interventions.spec import Intervention
from nla_megatron.tasks.nla import NlaTask
from tests.support.tiny import AR_TEMPLATE, AV_TEMPLATE, LAYER, tiny_config, tiny_rows, tiny_table

DOCUMENTS, ROWS_PER_DOCUMENT = 40, 3


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> BuildConfig:
    """A finished build."""
    directory = tmp_path_factory.mktemp("build")
    source = tiny_table(
        directory / "explained.parquet", model_dir, "explained", tiny_rows(64, DOCUMENTS, ROWS_PER_DOCUMENT)
    )
    config = BuildConfig(
        out=str(directory / "out"), input=str(source), model=str(model_dir), held_out=0.2,
        templates=TemplateConfig(AV_TEMPLATE, AR_TEMPLATE), intervention=InterventionConfig("replace", 0, 150.0),
    )  # fmt: skip
    build.check(config, 1)
    build.run(config)
    return config


def opened(config: BuildConfig) -> dict[str, Table]:
    return {split: Table.open(Path(config.out) / f"{split}.parquet", stage) for split, stage in build.STAGES.items()}


def test_rows_of_one_document_never_cross_splits(config: BuildConfig) -> None:
    documents = {split: set(table.column(columns.DOC_ID)) for split, table in opened(config).items()}
    assert Counter(doc for split in documents.values() for doc in split) == Counter(
        f"tiny:train:{number}" for number in range(DOCUMENTS)
    )


def test_no_row_is_lost_changed_or_doubled(config: BuildConfig) -> None:
    source = Table.open(config.input, "explained")
    keys = list(zip(source.column(columns.DOC_ID), source.column(columns.N_RAW_TOKENS), strict=True))
    found: Counter[tuple[str, int]] = Counter()
    for table in opened(config).values():
        here = list(zip(table.column(columns.DOC_ID), table.column(columns.N_RAW_TOKENS), strict=True))
        found.update(here)
        rows = [keys.index(key) for key in here]
        np.testing.assert_array_equal(table.vectors(range(table.n_rows)), source.vectors(rows))
        texts = source.column(columns.TEXT)
        assert table.column(columns.TEXT) == [texts[row] for row in rows]
    assert found == Counter(keys)


def test_splits_have_about_their_fractions(model_dir: Path) -> None:
    config = BuildConfig(held_out=0.1, fractions={"av_sft": 0.2, "ar_sft": 0.3, "rl": 0.5})
    rows = build.split_rows(config, [f"doc:{number}" for number in range(4000)])
    sizes = {split: len(chosen) / 4000 for split, chosen in rows.items()}
    assert sizes == pytest.approx({"held_out": 0.1, "av_sft": 0.18, "ar_sft": 0.27, "rl": 0.45}, abs=0.03)


def test_the_seed_shuffles_the_splits_but_not_what_is_held_out() -> None:
    doc_ids = [f"doc:{number}" for number in range(200)]
    one, other = (build.split_rows(BuildConfig(seed=seed), doc_ids) for seed in (0, 1))
    assert one["held_out"] == other["held_out"] and one["rl"] != other["rl"]


@pytest.mark.parametrize(("split", "stage"), build.STAGES.items())
def test_sidecars_are_complete(config: BuildConfig, split: str, stage: str) -> None:
    path = Path(config.out) / f"{split}.parquet"
    sidecar, source = read_dataset_sidecar(path), read_dataset_sidecar(config.input)
    assert (sidecar.stage, sidecar.row_count) == (stage, Table.open(path, stage).n_rows)
    assert (sidecar.extraction, sidecar.api_summaries) == (source.extraction, source.api_summaries)
    assert sidecar.parent_datasets == (source.dataset_id,) and sidecar.dataset_id.startswith(f"{stage}_")
    assert sidecar.injection is not None
    assert (sidecar.injection.method, sidecar.injection.layer, sidecar.injection.scale) == ("replace", 0, 150.0)
    contract = prompt_contract(sidecar)
    contract.check(load_tokenizer(config.model))
    assert (contract.templates_av, contract.templates_ar) == (AV_TEMPLATE, AR_TEMPLATE)


def test_every_table_knows_the_mean_of_all_rows_that_are_not_held_out(config: BuildConfig) -> None:
    """By hand, from the tables as they were written: each vector at the length of the error's scale."""
    trained = [table.vectors(range(table.n_rows)) for split, table in opened(config).items() if split != "held_out"]
    vectors = np.concatenate(trained).astype(np.float64)
    mean = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True) * np.sqrt(64)).mean(axis=0)
    for split in build.STAGES:
        path = Path(config.out) / f"{split}.parquet"
        spec = read_dataset_sidecar(path).baseline
        assert spec is not None and (spec.rows, spec.scale) == (len(vectors), "sqrt_d_model")
        np.testing.assert_allclose(read_baseline(path, spec, 64), mean, atol=1e-6)
        np.testing.assert_array_equal(np.load(f"{path}.mean.npy"), read_baseline(path, spec, 64))


@pytest.mark.parametrize(("split", "stage"), build.STAGES.items())
def test_every_table_opens_as_a_task(config: BuildConfig, split: str, stage: str) -> None:
    task = NlaTask.open(str(Path(config.out) / f"{split}.parquet"), stage, config.model)
    assert task.interventions == (Intervention(0, "replace", strength=150.0),)
    assert task.sidecar.extraction.layer_index == LAYER


def test_prompts_and_responses_are_those_of_the_stage(config: BuildConfig) -> None:
    tables = opened(config)
    explanations = {
        (doc, n): text
        for doc, n, text in zip(
            *(Table.open(config.input, "explained").column(name)
              for name in (columns.DOC_ID, columns.N_RAW_TOKENS, columns.EXPLANATION)), strict=True,
        )
    }  # fmt: skip
    for split, table in tables.items():
        gold = [explanations[key] for key in zip(
            table.column(columns.DOC_ID), table.column(columns.N_RAW_TOKENS), strict=True)]  # fmt: skip
        prompts = table.column(columns.PROMPT)
        if split == "ar_sft":
            assert prompts == [f"<text>{text}</text> <summary>" for text in gold]
            continue
        assert prompts == [[{"role": "user", "content": AV_TEMPLATE}]] * table.n_rows and INJECT in AV_TEMPLATE
        assert table.column(columns.EXPLANATION) == gold
        if split == "av_sft":
            assert table.column(columns.RESPONSE) == [f"<explanation>\n{text}\n</explanation>" for text in gold]


def refusal(kind: type[NlaError], config: BuildConfig) -> str:
    with pytest.raises(kind) as caught:
        build.check(config, 1)
    return caught.value.found


@pytest.fixture
def fresh(config: BuildConfig, tmp_path: Path) -> BuildConfig:
    return replace(config, out=str(tmp_path / "out"))


def test_a_split_without_documents_is_refused(fresh: BuildConfig) -> None:
    with pytest.raises(ConfigError, match="no document of 40 falls into rl"):
        build.run(replace(fresh, fractions={"av_sft": 0.4995, "ar_sft": 0.4995, "rl": 0.001}))


def test_nothing_is_held_out_when_nothing_is_asked_for() -> None:
    assert build.split_rows(BuildConfig(held_out=0.0), [f"doc:{n}" for n in range(50)])["held_out"] == []


def test_a_model_of_another_width_is_refused(fresh: BuildConfig, tmp_path: Path) -> None:
    found = refusal(WidthError, replace(fresh, model=str(tiny_config(tmp_path / "narrow", hidden_size=32))))
    assert "width 64" in found


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"fractions": {"av_sft": 0.5, "rl": 0.5}}, "av_sft, rl"),
        ({"fractions": {"av_sft": 0.5, "ar_sft": 0.5, "rl": 0.5}}, "sum 1.5"),
        ({"held_out": 1.0}, "held-out fraction 1.0"),
        ({"intervention": InterventionConfig(layer=4)}, "intervention.layer=4"),
        ({"templates": TemplateConfig(av="no place for the vector")}, "<INJECT> 0 times"),
        ({"templates": TemplateConfig(ar="no text")}, "'no text'"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_before_anything_is_written(
    fresh: BuildConfig, changes: dict[str, object], named: str
) -> None:
    assert named in refusal(ConfigError, replace(fresh, **changes))  # type: ignore[arg-type]
    assert not Path(fresh.out).exists()


def test_a_missing_table_is_named(fresh: BuildConfig) -> None:
    assert "nowhere.parquet" in refusal(MissingFile, replace(fresh, input="nowhere.parquet"))


def test_several_blocks_and_markers_are_recorded_and_checked(config: BuildConfig, tmp_path: Path) -> None:
    several = replace(
        config, out=str(tmp_path / "out"), templates=TemplateConfig(positions=2),
        intervention=InterventionConfig("add", scale=0.5, layers=[3, -1]),
    )  # fmt: skip
    build.check(several, 1)
    build.run(several)
    task = NlaTask.open(f"{several.out}/rl.parquet", "rl", several.model)
    assert task.sidecar.injection == InjectionSpec("add", 3, 0.5, (3, -1))
    assert len(task.marker_positions) == 2 and [each.layer for each in task.interventions] == [3, "embedding"]
    [messages, *_] = task.table.column(columns.PROMPT)
    assert messages[0]["content"].count(INJECT) == 2
    with pytest.raises(ConfigError, match="intervention.layers=4"):
        build.check(replace(several, intervention=InterventionConfig("add", layers=[1, 4])), 1)
    for layers in ([], [1, 1]):
        with pytest.raises(ConfigError, match="intervention.layers"):
            InterventionConfig("add", layers=layers)
    with pytest.raises(ConfigError, match="2 times|1 times"):
        build.check(replace(several, templates=TemplateConfig(AV_TEMPLATE, AR_TEMPLATE, positions=2)), 1)


def test_a_projection_is_recorded_with_its_options(config: BuildConfig, tmp_path: Path) -> None:
    projection = ProjectionConfig("replace", 2, 0.1)
    projecting = replace(
        config, out=str(tmp_path / "out"), intervention=InterventionConfig("project", 3, 0.5, [3, -1], projection)
    )
    build.run(projecting)
    task = NlaTask.open(f"{projecting.out}/av_sft.parquet", "av_sft", projecting.model)
    assert task.sidecar.injection == InjectionSpec("project", 3, 0.5, (3, -1), ProjectionSpec("replace", 2, 0.1))
    assert task.projection_dropout == 0.1 and task.interventions == tuple(
        Intervention(place, "project", strength=0.5, then="replace", projection_layers=2) for place in (3, "embedding")
    )
    plain = NlaTask.open(f"{config.out}/rl.parquet", "rl", config.model)
    assert plain.sidecar.injection == InjectionSpec("replace", 0, 150.0) and plain.projection_dropout == 0
    for wrong in (("add", 1, 1.0, None, projection), ("projection",)):
        with pytest.raises(ConfigError, match="intervention.method"):
            InterventionConfig(*wrong)  # type: ignore[arg-type]
    for options in (("project",), ("add", 0), ("add", 1, 0.5), ("add", 2, 1.0)):
        with pytest.raises(ConfigError, match="intervention.projection"):
            ProjectionConfig(*options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def stacked(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> BuildConfig:
    """Of a table whose rows keep three activations."""
    directory = tmp_path_factory.mktemp("stacked")
    rows = tiny_rows(64, DOCUMENTS, ROWS_PER_DOCUMENT, positions=3)
    source = tiny_table(directory / "explained.parquet", model_dir, "explained", rows)
    return BuildConfig(
        out=str(directory / "out"), input=str(source), model=str(model_dir), held_out=0.2,
        templates=TemplateConfig(positions=3), intervention=InterventionConfig("add", layers=[0, 2]),
    )  # fmt: skip


def test_activations_of_several_positions_are_carried_through(stacked: BuildConfig) -> None:
    build.check(stacked, 1)
    build.run(stacked)
    source = Table.open(stacked.input, "explained")
    keys = list(zip(source.column(columns.DOC_ID), source.column(columns.N_RAW_TOKENS), strict=True))
    for split, table in opened(stacked).items():
        here = zip(table.column(columns.DOC_ID), table.column(columns.N_RAW_TOKENS), strict=True)
        assert table.positions == 3
        np.testing.assert_array_equal(
            table.inputs(range(table.n_rows)), source.inputs([keys.index(key) for key in here])
        )
        path = f"{stacked.out}/{split}.parquet"
        assert read_dataset_sidecar(path).pool == PoolSpec("stack", 3)
        task = NlaTask.open(path, build.STAGES[split], stacked.model)
        assert [(each.layer, each.vectors) for each in task.interventions] == [(0, 3), (2, 3)]


@pytest.mark.parametrize("positions", [1, 2, 4])
def test_as_many_markers_as_a_row_has_activations_are_asked_for(
    stacked: BuildConfig, tmp_path: Path, positions: int
) -> None:
    wrong = replace(stacked, out=str(tmp_path / "out"), templates=TemplateConfig(positions=positions))
    with pytest.raises(ConfigError, match=r"set templates.positions=3") as caught:
        build.check(wrong, 1)
    assert caught.value.found.startswith(f"templates.positions={positions} for {stacked.input}, whose rows keep 3")
    assert not Path(wrong.out).exists()


@pytest.mark.parametrize(("pool", "told"), [(None, "1, as its sidecar"), (PoolSpec("stack", 4), "4, as its sidecar")])
def test_a_table_with_other_activations_than_its_sidecar_says_is_refused(
    stacked: BuildConfig, model_dir: Path, tmp_path: Path, pool: PoolSpec | None, told: str
) -> None:
    rows = tiny_rows(64, DOCUMENTS, ROWS_PER_DOCUMENT, positions=3)
    source = tiny_table(tmp_path / "explained.parquet", model_dir, "explained", rows)
    write_dataset_sidecar(source, replace(read_dataset_sidecar(source), pool=pool))
    with pytest.raises(SidecarError) as caught:
        build.check(replace(stacked, out=str(tmp_path / "out"), input=str(source)), 1)
    assert caught.value.found.startswith("3 activations in each row") and caught.value.expected.startswith(told)


@pytest.fixture(scope="module")
def varying(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> BuildConfig:
    """Of a table whose rows keep one to three activations."""
    directory = tmp_path_factory.mktemp("varying")
    rows = tiny_rows(64, DOCUMENTS, ROWS_PER_DOCUMENT, positions=3, fewest=1)
    source = tiny_table(directory / "explained.parquet", model_dir, "explained", rows)
    return BuildConfig(out=str(directory / "out"), input=str(source), model=str(model_dir), held_out=0.2)


def test_any_number_of_activations_is_carried_through_with_a_marker_for_each(varying: BuildConfig) -> None:
    build.check(varying, 1)
    build.run(varying)
    source = Table.open(varying.input, "explained")
    keys = list(zip(source.column(columns.DOC_ID), source.column(columns.N_RAW_TOKENS), strict=True))
    for split, table in opened(varying).items():
        here = zip(table.column(columns.DOC_ID), table.column(columns.N_RAW_TOKENS), strict=True)
        rows = [keys.index(key) for key in here]
        assert table.varies and set(table.activations) == {1, 2, 3}
        np.testing.assert_array_equal(table.inputs(range(table.n_rows)), source.inputs(rows))
        path, stage = f"{varying.out}/{split}.parquet", build.STAGES[split]
        assert read_dataset_sidecar(path).pool == PoolSpec("stack", 3, 1)
        if stage != "ar_sft":
            texts = [prompt[0]["content"] for prompt in table.column(columns.PROMPT)]
            assert [text.count("<concept><INJECT></concept>") for text in texts] == table.activations.tolist()
        assert NlaTask.open(path, stage, varying.model).interventions == (Intervention(1, vectors=3, fewest=1),)


def test_a_template_of_several_markers_is_not_repeated(varying: BuildConfig, tmp_path: Path) -> None:
    wrong = replace(varying, out=str(tmp_path / "out"), templates=TemplateConfig(positions=3))
    with pytest.raises(ConfigError, match=r"set templates.positions=1"):
        build.check(wrong, 1)
    with pytest.raises(ConfigError, match=r"which cannot be repeated"):
        build.check(replace(wrong, templates=TemplateConfig("the activation <INJECT> here")), 1)
    assert not Path(wrong.out).exists()


def with_explanations(config: BuildConfig, tmp_path: Path, change: Callable[[int, str], str | None]) -> BuildConfig:
    """The same build of a table whose explanations are others."""
    table = pq.read_table(config.input)
    at = table.schema.get_field_index(columns.EXPLANATION)
    texts = [change(row, text) for row, text in enumerate(table[columns.EXPLANATION].to_pylist())]
    path = tmp_path / "explained.parquet"
    pq.write_table(table.set_column(at, columns.EXPLANATION, pa.array(texts, pa.string())), path)
    shutil.copy(f"{config.input}.nla_meta.yaml", f"{path}.nla_meta.yaml")
    return replace(config, input=str(path), out=str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("text", "found"),
    [(None, "is null"), ("", "is ''"), (" \n", "is ' .n'"), ("<explanation>\n</explanation>", "<explanation>"),
     ("a</explanation> b", "tags inside"), ("<explanation>a</explanation> b", "tags inside")],
)  # fmt: skip
def test_a_row_that_explains_nothing_is_named_before_anything_is_written(
    config: BuildConfig, tmp_path: Path, text: str | None, found: str
) -> None:
    changed = with_explanations(config, tmp_path, lambda row, old: text if row == 17 else old)
    with pytest.raises(ColumnError, match=f"'api_explanation' in row 17 of .*{found}"):
        build.check(changed, 1)


def test_rows_that_explain_nothing_are_left_out_and_counted_where_that_is_asked_for(
    config: BuildConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = with_explanations(config, tmp_path, lambda row, old: (None if row % 2 else " ") if row % 5 == 0 else old)
    changed = replace(changed, missing_explanations="drop")
    build.check(changed, 1)
    build.run(changed)
    total, kept = DOCUMENTS * ROWS_PER_DOCUMENT, [table.n_rows for table in opened(changed).values()]
    counts = json.loads((Path(changed.out) / build.COUNTS).read_text())
    assert sum(kept) == total * 4 // 5 == total - counts["dropped_without_explanation"]
    assert list(counts["rows"].values()) == kept and f"{total // 5} of {total} rows" in capsys.readouterr().err
    responses = opened(changed)["av_sft"].column(columns.RESPONSE)
    assert not any("None" in text or not text.split("\n")[1].strip() for text in responses)


def test_tags_around_an_explanation_are_not_doubled(config: BuildConfig, tmp_path: Path) -> None:
    changed = with_explanations(config, tmp_path, lambda _, old: f" <explanation>\n{old}\n</explanation>\n")
    build.check(changed, 1)
    build.run(changed)
    for split, table in opened(changed).items():
        before = opened(config)[split]
        texts = {columns.EXPLANATION, columns.PROMPT, columns.RESPONSE}
        for name in texts & set(columns.schema(build.STAGES[split], 64).names):
            assert table.column(name) == before.column(name), (split, name)
