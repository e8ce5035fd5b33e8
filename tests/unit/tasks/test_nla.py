"""What a table and a model must agree on, and how rows become prompts, sequences and scores."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from nla_megatron.contract import columns
from nla_megatron.contract.sidecar import (
    InjectionSpec,
    PoolSpec,
    read_dataset_sidecar,
    read_model_sidecar,
    write_dataset_sidecar,
    write_model_sidecar,
)
from nla_megatron.contract.tokenizer import load_tokenizer
from nla_megatron.errors import ColumnError, ConfigError, MarkerError, MissingFile, NlaError, SidecarError, WidthError
from nla_megatron.interventions.spec import Intervention
from nla_megatron.models.batching import Batch, next_token_targets
from nla_megatron.models.pipeline import Collect
from nla_megatron.tasks.nla import NlaTask, explanations_of
from nla_megatron.types import Rollout
from tests.support.tiny import LAYER, tiny_config, tiny_model_sidecar, tiny_rows, tiny_table, tiny_tokenizer


@pytest.fixture(scope="module")
def task(tables: dict[str, Path], model_dir: Path) -> NlaTask:
    return NlaTask.open(str(tables["rl"]), "rl", str(model_dir))


def refusal(kind: type[NlaError], data: Path, stage: str, model: Path) -> str:
    with pytest.raises(kind) as caught:
        NlaTask.open(str(data), stage, str(model))
    assert type(caught.value) is kind
    return str(caught.value)


@pytest.mark.parametrize("stage", ["av_sft", "ar_sft", "rl"])
def test_a_table_opens_with_the_model_it_was_made_for(stage: str, tables: dict[str, Path], model_dir: Path) -> None:
    task = NlaTask.open(str(tables[stage]), stage, str(model_dir))
    assert (task.table.n_rows, task.table.d_model) == (48, 64)
    assert task.interventions == (Intervention(1, "norm_add", strength=1.0),)


def test_a_model_of_another_width_is_refused(tables: dict[str, Path], tmp_path: Path) -> None:
    message = refusal(WidthError, tables["rl"], "rl", tiny_config(tmp_path, hidden_size=32))
    assert "64" in message and "32" in message


def test_a_model_with_another_tokenizer_is_refused(tables: dict[str, Path], tmp_path: Path) -> None:
    """The marker is one token there too, with another id."""
    model = tiny_config(tmp_path)
    tiny_tokenizer(model, vocab_size=500)
    message = refusal(SidecarError, tables["rl"], "rl", model)
    assert "marker_id" in message and "tokenizer" in message


def test_a_sidecar_with_another_marker_is_refused(tables: dict[str, Path], model_dir: Path, tmp_path: Path) -> None:
    data = tiny_table(tmp_path / "rl.parquet", model_dir, "rl")
    sidecar = read_dataset_sidecar(data)
    assert sidecar.tokens is not None
    write_dataset_sidecar(data, replace(sidecar, tokens=replace(sidecar.tokens, injection_char="㊙")))
    assert "㊙" in refusal(MarkerError, data, "rl", model_dir)


def test_a_sidecar_without_injection_is_refused(model_dir: Path, tmp_path: Path) -> None:
    data = tiny_table(tmp_path / "rl.parquet", model_dir, "rl")
    write_dataset_sidecar(data, replace(read_dataset_sidecar(data), injection=None))
    assert "injection" in refusal(SidecarError, data, "rl", model_dir)


def test_layer_minus_one_of_a_sidecar_is_the_token_embedding(model_dir: Path, tmp_path: Path) -> None:
    data = tiny_table(tmp_path / "rl.parquet", model_dir, "rl")
    write_dataset_sidecar(data, replace(read_dataset_sidecar(data), injection=InjectionSpec("replace", -1, 3.0)))
    assert NlaTask.open(str(data), "rl", str(model_dir)).interventions == (
        Intervention("embedding", "replace", strength=3.0),
    )


def test_the_marker_has_the_neighbours_of_the_prompt(task: NlaTask) -> None:
    ids, at = task.prompt_ids, task.marker_position
    assert (task.marker.left_id, task.marker.token_id, task.marker.right_id) == ids[at - 1 : at + 2]


def test_a_missing_table_sidecar_or_tokenizer_is_named(
    tables: dict[str, Path], model_dir: Path, tmp_path: Path
) -> None:
    assert "nowhere.parquet" in refusal(MissingFile, tmp_path / "nowhere.parquet", "rl", model_dir)
    bare = tmp_path / "bare.parquet"
    bare.write_bytes(tables["rl"].read_bytes())
    assert "bare.parquet.nla_meta.yaml" in refusal(MissingFile, bare, "rl", model_dir)
    assert "tokenizer.json" in refusal(MissingFile, tables["rl"], "rl", tmp_path)


def test_a_table_of_another_stage_lacks_a_column(tables: dict[str, Path], model_dir: Path) -> None:
    message = refusal(ColumnError, tables["rl"], "av_sft", model_dir)
    assert "'response'" in message and "'av_sft'" in message


def test_models_of_the_same_build_pass(task: NlaTask, model_dir: Path, tmp_path: Path) -> None:
    for role in ("av", "ar"):
        assert task.check_model(str(tiny_model_sidecar(tmp_path / role, model_dir, role)), role).role == role


@pytest.mark.parametrize(
    ("changes", "key", "found"),
    [
        ({"role": "ar"}, "role", "ar"),
        ({"layer": LAYER + 1}, "extraction.layer_index", "3"),
        ({"injection": InjectionSpec("norm_add", 2, 1.0)}, "injection", "layer=2"),
        ({"injection": InjectionSpec("replace", 1, 1.0)}, "injection", "replace"),
        ({"injection": InjectionSpec("norm_add", 1, 2.0)}, "injection", "scale=2.0"),
    ],
)
def test_a_model_of_another_build_is_refused(
    task: NlaTask, model_dir: Path, tmp_path: Path, changes: dict[str, object], key: str, found: str
) -> None:
    directory = tiny_model_sidecar(tmp_path, model_dir, **{"role": "av", **changes})  # type: ignore[arg-type]
    with pytest.raises(SidecarError) as caught:
        task.check_model(str(directory), "av")
    assert caught.value.found.startswith(f"{key} = ") and found in caught.value.found
    assert str(task.table.path) in caught.value.expected


def test_of_another_prompt_contract_only_the_differences_are_told(
    task: NlaTask, model_dir: Path, tmp_path: Path
) -> None:
    directory = tiny_model_sidecar(tmp_path, model_dir, "av")
    other = replace(task, contract=replace(task.contract, marker="㈏", templates_av="Say <concept><INJECT></concept>"))
    with pytest.raises(SidecarError) as caught:
        other.check_model(str(directory), "av")
    assert caught.value.found.startswith("prompt contract = templates_av=") and "㈏" in caught.value.expected
    assert "templates_ar" not in caught.value.found + caught.value.expected


def test_a_model_without_a_sidecar_is_refused(task: NlaTask, tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="nla_meta.yaml"):
        task.check_model(str(tmp_path), "av")


def test_the_prompt_holds_the_marker_where_the_task_says(task: NlaTask) -> None:
    text = task.tokenizer.decode(list(task.prompt_ids[: task.marker_position]))
    assert str(text).endswith("Explain <concept>")
    assert task.tokenizer.decode([task.prompt_ids[task.marker_position]]) == task.contract.marker
    assert task.prompt_ids.count(task.contract.marker_id) == 1


def test_requests_carry_the_row_the_prompt_and_the_marker(task: NlaTask) -> None:
    requests = task.requests([5, 3], seed=0, step=0)
    assert [(one.group, one.row) for one in requests] == [(0, 5), (1, 3)]
    assert all((one.prompt_ids, one.position) == (task.prompt_ids, task.marker_position) for one in requests)


def test_sampling_seeds_depend_on_seed_step_and_row_alone(task: NlaTask) -> None:
    def seeds(rows: Sequence[int], seed: int = 1, step: int = 2) -> dict[int, int]:
        return {one.row: one.seed for one in task.requests(rows, seed, step)}

    whole = seeds(range(20))
    assert seeds([7]) | seeds([19, 3]) == {row: whole[row] for row in (7, 19, 3)}, "whatever rows stand beside it"
    assert len(set(whole.values())) == 20
    assert not set(whole.values()) & set(seeds(range(20), seed=2).values())
    assert not set(whole.values()) & set(seeds(range(20), step=3).values())
    assert all(0 <= value < 2**31 for value in whole.values())


def test_the_mask_of_a_response_batch_selects_the_responses(task: NlaTask) -> None:
    texts = ["<explanation>\nshort\n</explanation>", "<explanation>\nlonger, about more things\n</explanation>"]
    responses = [task.contract.av_response_ids(task.tokenizer, text) for text in texts]
    batch = task.response_batch([4, 9], responses, advantages=torch.tensor([1.0, -1.0]))
    width = batch.longest
    ids_BT = torch.tensor([[*row, *[0] * (width - len(row))] for row in batch.ids])
    mask_BT = batch.fields["mask"].bool()
    for targets_T, mask_T, response, text in zip(next_token_targets(ids_BT), mask_BT, responses, texts, strict=True):
        assert targets_T[mask_T].tolist() == response
        assert task.tokenizer.decode(targets_T[mask_T], skip_special=True) == text
    assert batch.positions == [(task.marker_position,)] * 2 and batch.fields["advantages"].tolist() == [1.0, -1.0]
    assert batch.vectors is not None
    np.testing.assert_array_equal(batch.vectors([1, 0]), task.table.vectors([9, 4]))


def test_the_gold_response_ends_with_the_end_token(tables: dict[str, Path], model_dir: Path) -> None:
    task = NlaTask.open(str(tables["av_sft"]), "av_sft", str(model_dir))
    ids = task.gold_response_ids(4)
    assert ids[-1] == task.tokenizer.fast.eos_token_id and task.tokenizer.fast.eos_token_id not in ids[:-1]
    text = str(task.tokenizer.decode(ids, skip_special=True))
    assert explanations_of([rollout(text)]) == [task.gold_explanations[4]]


def test_gold_prompts_are_what_the_ar_gets_for_the_same_text(tables: dict[str, Path], model_dir: Path) -> None:
    """So that the warm start and RL show the AR the same tokens."""
    task = NlaTask.open(str(tables["ar_sft"]), "ar_sft", str(model_dir))
    texts = tiny_rows(64)[columns.EXPLANATION]
    gold, formatted = task.gold_text_batch([3, 8]), task.text_batch([3, 8], [texts[3], texts[8]])
    assert gold.ids == formatted.ids and gold.positions is None
    assert gold.vectors is not None
    np.testing.assert_array_equal(gold.vectors([0, 1]), task.table.vectors([3, 8]))


def rollout(text: str, finished: bool = True) -> Rollout:
    return Rollout(0, 0, 0, (1,), (2,), (-1.0,), text, finished)


@pytest.mark.parametrize(
    ("text", "finished", "explanation"),
    [
        ("<explanation>\nabout whales\n</explanation>", True, "about whales"),
        ("<explanation>about whales</explanation>", True, "about whales"),
        ("<explanation>\nabout whales\n</explanation>", False, None),  # cut off, however well it looks
        ("<explanation>\nabout whales", True, None),
        ("about whales", True, None),
        ("<explanation>\n</explanation>", True, None),
        ("<explanation>a</explanation> and more", True, None),
        ("<explanation>a</explanation><explanation>b</explanation>", True, None),
        ("", True, None),
    ],
)
def test_an_explanation_needs_a_finished_well_formed_response(
    text: str, finished: bool, explanation: str | None
) -> None:
    assert explanations_of([rollout(text, finished)]) == [explanation]


def test_failed_explanations_score_2_and_never_reach_the_reader(task: NlaTask) -> None:
    seen: list[Batch] = []

    def reader(batch: Batch, collect: Collect) -> Tensor:
        seen.append(batch)
        return torch.tensor([0.25, 0.5])

    mse_N, failed_N = task.score(reader, [5, 6, 7], ["about one", None, "about two"])
    assert mse_N.tolist() == [0.25, 2.0, 0.5] and failed_N.tolist() == [False, True, False]
    [batch] = seen
    assert batch.vectors is not None
    np.testing.assert_array_equal(batch.vectors([0, 1]), task.table.vectors([5, 7]))
    assert task.score(reader, [5], [None])[0].tolist() == [2.0] and len(seen) == 1


def test_targets_are_normalised_to_the_root_of_the_width(task: NlaTask) -> None:
    torch.testing.assert_close(task.normalised_targets([0, 1]).norm(dim=1), torch.full((2,), 8.0))


def test_a_tokenizer_that_needs_auto_is_loaded_alike(model_dir: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (model_dir / name).is_file():
            (tmp_path / name).write_bytes((model_dir / name).read_bytes())
    config = (tmp_path / "tokenizer_config.json").read_text()
    plain = load_tokenizer(str(model_dir))
    (tmp_path / "tokenizer_config.json").write_text(config.replace(type(plain.fast).__name__, "Qwen2TokenizerFast"))
    (tmp_path / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    text = "<concept>㈎</concept> in a tuple"
    assert load_tokenizer(tmp_path).encode(text, special=True) == plain.encode(text, special=True)


def test_an_av_whose_responses_nothing_ends_is_refused_before_it_starts(model_dir: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(model_dir, tmp_path / "endless"))
    for name, key in (
        ("tokenizer_config", "eos_token"),
        ("config", "eos_token_id"),
        ("generation_config", "eos_token_id"),
    ):
        path = directory / f"{name}.json"
        if path.is_file():
            path.write_text(json.dumps({**json.loads(path.read_text()), key: None}))
    data = tiny_table(tmp_path / "rl.parquet", model_dir, "rl")
    assert "no end token" in refusal(ConfigError, data, "rl", directory)


def test_several_blocks_of_a_sidecar_are_several_interventions(model_dir: Path, tmp_path: Path) -> None:
    data = tiny_table(tmp_path / "rl.parquet", model_dir, "rl")
    sidecar = read_dataset_sidecar(data)
    write_dataset_sidecar(data, replace(sidecar, injection=InjectionSpec("add", -1, 0.5, (-1, 2))))
    assert NlaTask.open(str(data), "rl", str(model_dir)).interventions == (
        Intervention("embedding", "add", strength=0.5),
        Intervention(2, "add", strength=0.5),
    )
    write_dataset_sidecar(data, replace(sidecar, injection=InjectionSpec("add", 1, 0.5, (1, 4))))
    assert "injection.layers = 4" in refusal(SidecarError, data, "rl", model_dir)


def test_a_vector_enters_at_every_marker_of_its_prompt(model_dir: Path, tmp_path: Path) -> None:
    data = tiny_table(tmp_path / "rl.parquet", model_dir, "rl")
    sidecar, template = read_dataset_sidecar(data), "Explain <concept><INJECT></concept> or <concept><INJECT></concept>"
    assert sidecar.prompt_templates is not None
    templates = replace(sidecar.prompt_templates, av=template)
    write_dataset_sidecar(data, replace(sidecar, prompt_templates=templates, av_prompt=None))
    task = NlaTask.open(str(data), "rl", str(model_dir))
    first, second = task.marker_positions
    assert [task.prompt_ids[at - 1 : at + 2] for at in (first, second)] == [
        (task.marker.left_id, task.marker.token_id, task.marker.right_id)
    ] * 2
    [request] = task.requests([3], 0, 0)
    assert (request.position, request.more_positions) == (first, (second,))
    assert task.response_batch([3], [[7, 8]]).positions == [(first, second)]


def test_models_of_pooled_activations_are_not_used_for_others(task: NlaTask, model_dir: Path, tmp_path: Path) -> None:
    directory = tiny_model_sidecar(tmp_path, model_dir, "ar")
    write_model_sidecar(directory, replace(read_model_sidecar(directory), pool=PoolSpec("mean", 8)))
    with pytest.raises(SidecarError, match="window=8"):
        task.check_model(str(directory), "ar")


@pytest.fixture(scope="module")
def stacked(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> NlaTask:
    data = tmp_path_factory.mktemp("stacked") / "rl.parquet"
    return NlaTask.open(str(tiny_table(data, model_dir, "rl", tiny_rows(64, positions=3))), "rl", str(model_dir))


def test_each_activation_of_a_row_has_a_marker_and_the_own_one_is_what_is_rebuilt(stacked: NlaTask) -> None:
    rows = tiny_rows(64, positions=3)
    own, before = rows[columns.VECTOR], rows[columns.PRECEDING].reshape(-1, 2, 64)
    assert stacked.interventions == (Intervention(1, "norm_add", vectors=3),)
    batch, targets = stacked.response_batch([4, 9], [[7, 8], [6]]), stacked.text_batch([4, 9], ["one", "two"])
    assert batch.vectors is not None and targets.vectors is not None
    found = batch.vectors([1, 0])
    for row, vectors in zip((9, 4), found, strict=True):
        np.testing.assert_array_equal(vectors, [*before[row], own[row]])
    np.testing.assert_array_equal(targets.vectors([1, 0]), own[[9, 4]])
    torch.testing.assert_close(
        stacked.normalised_targets([4])[0], torch.from_numpy(own[4] * 8 / np.linalg.norm(own[4]))
    )
    places = [at for at, one in enumerate(stacked.prompt_ids) if one == stacked.contract.marker_id]
    assert len(places) == 3 and batch.positions == [tuple(places)] * 2
    [request] = stacked.requests([3], 0, 0)
    assert (request.position, *request.more_positions) == tuple(places)


def test_a_table_with_other_activations_than_its_sidecar_says_is_refused(model_dir: Path, tmp_path: Path) -> None:
    single = tiny_table(tmp_path / "single.parquet", model_dir, "rl")
    several = tiny_table(tmp_path / "several.parquet", model_dir, "rl", tiny_rows(64, positions=3))
    for data, other in ((single, several), (several, single)):
        (tmp_path / "rl.parquet").write_bytes(data.read_bytes())
        write_dataset_sidecar(tmp_path / "rl.parquet", read_dataset_sidecar(other))
        assert "activations in each row" in refusal(SidecarError, tmp_path / "rl.parquet", "rl", model_dir)


def test_models_of_single_activations_are_not_used_for_several(
    stacked: NlaTask, task: NlaTask, model_dir: Path, tmp_path: Path
) -> None:
    directory = tiny_model_sidecar(tmp_path, model_dir, "av")
    task.check_model(str(directory), "av")
    with pytest.raises(SidecarError):
        stacked.check_model(str(directory), "av")
    model, sidecar = read_model_sidecar(directory), stacked.sidecar
    write_model_sidecar(
        directory,
        replace(
            model,
            prompt_templates=sidecar.prompt_templates,
            tokens=sidecar.tokens,
            pool=sidecar.pool,
            av_prompt=sidecar.av_prompt,
        ),
    )
    assert stacked.check_model(str(directory), "av").pool == PoolSpec("stack", 3)


@pytest.fixture(scope="module")
def varying(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> NlaTask:
    """Rows of one, two and three activations in turn."""
    data = tmp_path_factory.mktemp("varying") / "rl.parquet"
    return NlaTask.open(
        str(tiny_table(data, model_dir, "rl", tiny_rows(64, positions=3, fewest=1))), "rl", str(model_dir)
    )


def test_each_row_has_a_marker_for_each_of_its_own_activations(varying: NlaTask) -> None:
    rows = tiny_rows(64, positions=3, fewest=1)
    assert varying.interventions == (Intervention(1, "norm_add", vectors=3, fewest=1),)
    batch, targets = varying.response_batch([5, 3, 4], [[7, 8], [6], [9]]), varying.text_batch([5, 3], ["one", "two"])
    assert batch.vectors is not None and batch.positions is not None and targets.vectors is not None
    requests = varying.requests([5, 3, 4], 0, 0)
    for index, (row, count) in enumerate({5: 3, 3: 1, 4: 2}.items()):
        prompt = varying.prompt_of(row)
        places = tuple(at for at, one in enumerate(prompt.ids) if one == varying.contract.marker_id)
        assert len(places) == count == varying.table.activations[row]
        assert batch.positions[index] == places == requests[index].positions
        assert requests[index].prompt_ids == prompt.ids and batch.ids[index][: len(prompt.ids)] == [*prompt.ids]
        [found] = batch.vectors([index])
        own = [*rows[columns.PRECEDING][row].reshape(-1, 64), rows[columns.VECTOR][row]]
        np.testing.assert_array_equal(found[3 - count :], own)
        assert np.isnan(found[: 3 - count]).all()
    assert batch.prompt_lengths == [len(varying.prompt(count).ids) for count in (3, 1, 2)]
    # What is predicted begins behind each row's own prompt.
    assert batch.fields["mask"].sum(1).tolist() == [2, 1, 1]
    assert [int(row.argmax()) for row in batch.fields["mask"]] == [length - 1 for length in batch.prompt_lengths]
    np.testing.assert_array_equal(targets.vectors([0, 1]), rows[columns.VECTOR][[5, 3]])


def test_the_longest_prompt_is_that_of_the_most_activations(varying: NlaTask) -> None:
    lengths = [len(varying.prompt_of(row).ids) for row in range(varying.table.n_rows)]
    assert len(varying.prompt_ids) == max(lengths) > min(lengths)


def test_a_table_whose_rows_all_keep_fewer_still_goes_with_the_models_of_the_build(
    varying: NlaTask, model_dir: Path, tmp_path: Path
) -> None:
    """As a small held-out table may: the sampler's buffers are as wide as the contract says."""
    rows = tiny_rows(64, rows_per_document=1, positions=3, fewest=1)
    data = tiny_table(tmp_path / "rl.parquet", model_dir, "rl", rows)
    write_dataset_sidecar(data, replace(read_dataset_sidecar(data), pool=PoolSpec("stack", 3, 1)))
    task = NlaTask.open(str(data), "rl", str(model_dir))
    assert task.table.positions == 1 and task.interventions == varying.interventions
    assert task.inputs([0, 1]).shape == (2, 3, 64)


def test_rows_outside_the_bounds_of_their_sidecar_are_refused(
    varying: NlaTask, model_dir: Path, tmp_path: Path
) -> None:
    for pool, told in (
        (PoolSpec("stack", 3, 2), "1 activations in row 0"),
        (PoolSpec("stack", 2, 1), "3 activations in row 2"),
    ):
        data = tmp_path / "rl.parquet"
        data.write_bytes(varying.table.path.read_bytes())
        write_dataset_sidecar(data, replace(varying.sidecar, pool=pool))
        message = refusal(SidecarError, data, "rl", model_dir)
        assert told in message and f"{pool.least} to {pool.window}, as its sidecar says" in message


def test_lists_of_activations_and_a_fixed_number_of_them_are_not_taken_for_each_other(
    varying: NlaTask, stacked: NlaTask, tmp_path: Path, model_dir: Path
) -> None:
    told = ("any number of activations in each row", "3, as its sidecar says"), (
        "3 activations in each row", "lists of 1 to 3, as its sidecar says"
    )  # fmt: skip
    for data, other, (found, expected) in ((varying, stacked, told[0]), (stacked, varying, told[1])):
        (tmp_path / "rl.parquet").write_bytes(data.table.path.read_bytes())
        write_dataset_sidecar(tmp_path / "rl.parquet", other.sidecar)
        message = refusal(SidecarError, tmp_path / "rl.parquet", "rl", model_dir)
        assert found in message and expected in message


@pytest.mark.parametrize(("count", "told"), [(0, "0 times <INJECT>"), (1, "1 times <INJECT>"), (3, "3 times <INJECT>")])
def test_a_stored_prompt_with_other_markers_than_its_row_has_activations_is_named(
    varying: NlaTask, model_dir: Path, tmp_path: Path, count: int, told: str
) -> None:
    data = pq.read_table(varying.table.path)
    at, prompts = data.column_names.index(columns.PROMPT), data.column(columns.PROMPT).to_pylist()
    prompts[4] = [{"role": "user", "content": "Explain " + "<concept><INJECT></concept>" * count}]
    changed = data.set_column(at, data.schema.field(at), pa.array(prompts, data.schema.field(at).type))
    pq.write_table(changed, tmp_path / "rl.parquet")
    write_dataset_sidecar(tmp_path / "rl.parquet", varying.sidecar)
    message = refusal(MarkerError, tmp_path / "rl.parquet", "rl", model_dir)
    assert told in message and "row 4" in message and "keeps 2 activations" in message


def test_models_of_a_fixed_number_are_not_used_for_any_number(
    varying: NlaTask, stacked: NlaTask, model_dir: Path, tmp_path: Path
) -> None:
    directory = tiny_model_sidecar(tmp_path, model_dir, "av")
    model = read_model_sidecar(directory)
    for task, other in ((varying, stacked), (stacked, varying)):
        mine = task.sidecar
        write_model_sidecar(
            directory,
            replace(
                model,
                prompt_templates=mine.prompt_templates,
                tokens=mine.tokens,
                pool=mine.pool,
                av_prompt=mine.av_prompt,
            ),
        )
        assert task.check_model(str(directory), "av").pool == mine.pool
        with pytest.raises(SidecarError, match="prompt contract"):
            other.check_model(str(directory), "av")


def test_a_row_says_where_its_activation_was_read(task: NlaTask) -> None:
    table = pq.read_table(task.table.path)
    for row in (0, task.table.n_rows - 1):
        found = task.place(row)
        assert found["row"] == row and found["doc_id"] == table[columns.DOC_ID][row].as_py()
        assert found["position"] == table[columns.N_RAW_TOKENS][row].as_py() - 1
        text = table[columns.TEXT][row].as_py()
        assert found["token"] and text.endswith(found["token"])


@pytest.mark.parametrize("name", [columns.DOC_ID, columns.N_RAW_TOKENS, columns.RESPONSE])
def test_a_null_is_named_by_its_row_where_the_table_is_opened(
    tables: dict[str, Path], model_dir: Path, tmp_path: Path, name: str
) -> None:
    table = pq.read_table(tables["av_sft"])
    values = [None if row == 3 else value for row, value in enumerate(table[name].to_pylist())]
    at = table.schema.get_field_index(name)
    path = tmp_path / "av_sft.parquet"
    pq.write_table(table.set_column(at, name, pa.array(values, table.schema.field(name).type)), path)
    write_dataset_sidecar(path, read_dataset_sidecar(tables["av_sft"]))
    assert f"'{name}' in row 3 of" in refusal(ColumnError, path, "av_sft", model_dir)


def test_a_table_without_rows_is_refused(tables: dict[str, Path], model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "rl.parquet"
    pq.write_table(pq.read_table(tables["rl"]).slice(0, 0), path)
    write_dataset_sidecar(path, replace(read_dataset_sidecar(tables["rl"]), row_count=0))
    assert "no rows" in refusal(ColumnError, path, "rl", model_dir)
