"""Several blocks, markers or activations, projections, pooling and another head, from the table to evaluation."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nla_megatron.contract import columns
from nla_megatron.contract.sidecar import (
    InjectionSpec,
    PoolSpec,
    ProjectionSpec,
    read_dataset_sidecar,
    read_model_sidecar,
    write_dataset_sidecar,
    write_model_sidecar,
)
from nla_megatron.contract.tables import Table
from nla_megatron.contract.tokenizer import load_tokenizer
from nla_megatron.conversion.hf import HEAD_FILE
from nla_megatron.conversion.projections import PROJECTION_FILE
from nla_megatron.evaluation.held_out import deranged
from nla_megatron.interventions.projection import Projection
from nla_megatron.tasks.nla import NlaTask
from tests.support.hooked import Change, Hooked, norm_add
from tests.support.ranks import command
from tests.support.tiny import (
    AR_TEMPLATE,
    AV_TEMPLATE,
    tiny_contract,
    tiny_model,
    tiny_model_sidecar,
    tiny_rows,
    tiny_table,
)

pytestmark = pytest.mark.slow

TEMPLATE = "Explain <concept><INJECT></concept> and <concept><INJECT></concept>"
LONGER = ("rollout.max_new_tokens=72", "rollout.max_model_len=160", "rollout.max_num_seqs=16")
ROLLOUT = ("rollout.max_new_tokens=12", "rollout.max_model_len=128", "rollout.max_num_seqs=16")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, tables of pooled activations with two markers and two blocks, and both models' warm start."""
    out = tmp_path_factory.mktemp("variants")
    base = tiny_model(out / "base")
    source = tiny_table(out / "explained.parquet", base, "explained", tiny_rows(64, 40, 3))
    write_dataset_sidecar(source, replace(read_dataset_sidecar(source), pool=PoolSpec("mean", 8)))
    done = command(
        "build", f"input={source}", f"model={base}", f"out={out / 'build'}", "held_out=0.2",
        f"templates.av='{TEMPLATE}'", f"templates.ar='{AR_TEMPLATE}'", "templates.positions=2",
        "intervention.layers=[0,2]",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = command(
        "sft", "role=both", f"model={base}", f"data={out / 'build' / 'av_sft.parquet'}",
        f"ar_data={out / 'build' / 'ar_sft.parquet'}", f"out={out / 'sft'}", "steps=3", "batch_size=4",
        "reconstructor.pooling=weighted", "reconstructor.projection_layers=2", "reconstructor.layer=1",
        "ar_loss.variance_reg=0.1", "parallel=tp2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


def test_sampler_and_trainer_agree_and_the_head_is_carried_on(built: Path, tmp_path: Path) -> None:
    models = (f"av={built / 'sft' / 'av'}", f"ar={built / 'sft' / 'ar'}")
    done = command(
        "rl", *models, f"data={built / 'build' / 'rl.parquet'}", f"out={tmp_path / 'rl'}", "steps=2", "batch_size=3",
        "samples_per_prompt=2", "rollout.max_logprob_gap=1e-3", "optim.lr=1e-3", "parallel=tp2", *ROLLOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line) for line in (tmp_path / "rl" / "metrics.jsonl").read_text().splitlines()]
    assert [step["injected"] for step in steps] == [6, 6]
    assert all(step["logprob_gap_max"] <= 2e-4 for step in steps)
    for role in ("av", "ar"):
        before, after = read_model_sidecar(built / "sft" / role), read_model_sidecar(tmp_path / "rl" / role)
        assert (after.pool, after.injection, after.reconstructor) == (
            before.pool, before.injection, before.reconstructor,
        )  # fmt: skip
    assert read_model_sidecar(tmp_path / "rl" / "av").injection.layers == (0, 2)  # type: ignore[union-attr]
    assert (tmp_path / "rl" / "ar" / HEAD_FILE).is_file()


def test_evaluation_reads_with_the_head_of_the_sidecar(built: Path, tmp_path: Path) -> None:
    models = (f"av={built / 'sft' / 'av'}", f"ar={built / 'sft' / 'ar'}")
    data = f"data={built / 'build' / 'held_out.parquet'}"
    done = command("eval", *models, data, f"out={tmp_path / 'eval'}", "rows=8", "+names.ends=[Ends]", *ROLLOUT)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert found["injected"] == found["expected_injections"] == 16 and found["extraction_failed_gold"] == 0
    examples = [json.loads(line) for line in (tmp_path / "eval" / "examples.jsonl").read_text().splitlines()]
    ending = sum("ends" in re.findall(r"\w+", example["gold"].lower()) for example in examples)
    assert found["named_gold"] == {"ends": {"found": ending, "of": 8}}
    assert set(found) >= {"named_av", "named_shuffled"}


def test_sampler_and_trainer_follow_the_same_curriculum(built: Path, tmp_path: Path) -> None:
    models = (f"av={built / 'sft' / 'av'}", f"ar={built / 'sft' / 'ar'}")
    common = (
        *models, f"data={built / 'build' / 'rl.parquet'}", "steps=4", "batch_size=3", "samples_per_prompt=2",
        "rollout.max_logprob_gap=1e-3", "optim.lr=1e-3", "parallel=tp2", "ar_loss.kind=cosine",
        f"held_out={built / 'build' / 'held_out.parquet'}", "eval_every=1", "eval_rows=4", "export=false",
        "algorithm.minibatches=3", *ROLLOUT,
    )  # fmt: skip
    harder = ("curriculum.kind=linear", "curriculum.start=4", "curriculum.layers=[1]", "curriculum.steps=2")
    runs = {
        "plain": (),
        "harder": (*harder, "rollout.record=true"),
        "replayed": (*harder, f"rollout.replay={tmp_path / 'harder'}"),
    }
    steps = {}
    for name, options in runs.items():
        done = command("rl", *common, f"out={tmp_path / name}", *options)
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        steps[name] = [json.loads(line) for line in lines]
        assert all(step["logprob_gap_max"] <= 2e-4 for step in steps[name])
    assert steps["plain"][0]["entropy"] != steps["harder"][0]["entropy"]
    for again, first in zip(steps["replayed"], steps["harder"], strict=True):
        assert again["policy_loss"] == pytest.approx(first["policy_loss"], abs=1e-4)
        assert again["entropy"] == pytest.approx(first["entropy"], abs=1e-4)


@pytest.fixture(scope="module")
def stacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, the activations of three positions a row, at two blocks, and both models' warm start."""
    out = tmp_path_factory.mktemp("stacked")
    base, names = tiny_model(out / "base"), sorted(topics)[:24]
    corpus = [json.dumps({"doc_id": f"topics:train:{name}", "text": topics[name][:300]}) for name in names]
    (out / "corpus.jsonl").write_text("\n".join(corpus))
    template = "Explain " + " and ".join(["<concept><INJECT></concept>"] * 3)
    model, tables = f"model={base}", {name: out / "build" / f"{name}.parquet" for name in ("av_sft", "ar_sft")}
    for words in (
        ("extract", model, f"corpus={out / 'corpus.jsonl'}", "layer=2", "pool=stack", "pool_window=3", "min_position=8",
         "max_length=48", "positions_per_doc=2", "batch_size=5", "parallel=tp2", f"out={out / 'extract'}"),
        ("explain", f"input={out / 'extract' / 'base.parquet'}", f"out={out / 'explain'}"),
        ("build", model, f"input={out / 'explain' / 'explained.parquet'}", "held_out=0.3", f"templates.av='{template}'",
         f"templates.ar='{AR_TEMPLATE}'", "templates.positions=3", "intervention.layers=[0,2]", f"out={out / 'build'}"),
        # Until the AV ends its explanations; of texts that are none, all that is measured would be alike.
        ("sft", "role=both", model, f"data={tables['av_sft']}", f"ar_data={tables['ar_sft']}", f"out={out / 'sft'}",
         "steps=80", "batch_size=16", "micro_batch_size=16", "parallel=tp2", "optim.lr=5e-3", "ar_optim.lr=5e-3",
         "save_every=80"),
    ):  # fmt: skip
        done = command(*words)
        assert done.returncode == 0, done.stderr
    return out


def test_extract_stacks_the_hidden_states_of_transformers(stacked: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(stacked / "base"), load_tokenizer(stacked / "base")
    table = Table.open(stacked / "extract" / "base.parquet", "base")
    assert (table.n_rows, table.positions) == (48, 3)
    rows = zip(table.column(columns.DOC_ID), table.column(columns.N_RAW_TOKENS), table.inputs(range(48)), strict=True)
    for doc_id, stop, vectors_KD in rows:
        ids = tokenizer.encode(topics[doc_id.split(":")[-1]][:300], special=True)[:48]
        with torch.no_grad():
            states_TD = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[3][0]
        np.testing.assert_allclose(vectors_KD, states_TD[stop - 3 : stop], atol=1e-4)
    rl = Table.open(stacked / "build" / "rl.parquet", "rl")
    keys = list(zip(table.column(columns.DOC_ID), table.column(columns.N_RAW_TOKENS), strict=True))
    here = zip(rl.column(columns.DOC_ID), rl.column(columns.N_RAW_TOKENS), strict=True)
    np.testing.assert_array_equal(rl.inputs(range(rl.n_rows)), table.inputs([keys.index(key) for key in here]))


def test_sampler_and_trainer_inject_each_activation_at_its_marker(stacked: Path, tmp_path: Path) -> None:
    models = (f"av={stacked / 'sft' / 'av'}", f"ar={stacked / 'sft' / 'ar'}")
    held_out = stacked / "build" / "held_out.parquet"
    done = command(
        "rl", *models, f"data={stacked / 'build' / 'rl.parquet'}", f"out={tmp_path / 'rl'}", "steps=2", "batch_size=3",
        "samples_per_prompt=2", "rollout.max_logprob_gap=1e-3", "optim.lr=1e-3", "parallel=tp2",
        f"held_out={held_out}", "eval_every=1", "eval_rows=8", *LONGER,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line) for line in (tmp_path / "rl" / "metrics.jsonl").read_text().splitlines()]
    assert [step["injected"] for step in steps] == [6, 6]
    assert all(step["logprob_gap_max"] <= 2e-4 for step in steps)
    assert [read_model_sidecar(tmp_path / "rl" / role).pool for role in ("av", "ar")] == [PoolSpec("stack", 3)] * 2
    trained = (f"av={tmp_path / 'rl' / 'av'}", f"ar={tmp_path / 'rl' / 'ar'}")
    frozen = f"frozen_ar={stacked / 'sft' / 'ar'}"
    done = command("eval", *trained, frozen, f"data={held_out}", f"out={tmp_path / 'eval'}", "rows=8", *LONGER)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert found["injected"] == found["expected_injections"] == 16 and found["extraction_failed_gold"] == 0
    # One measurement: the run's last evaluation is that of the models it exports, on the same rows.
    assert found["extraction_failed_av"] < 1 and found["documents"] >= 4, "explanations, of several documents"
    last = steps[-1]
    assert last["eval_fve"] == pytest.approx(found["fve_av"], abs=1e-4)
    assert [last["eval_fve_low"], last["eval_fve_high"]] == pytest.approx(found["fve_av_ci95"], abs=1e-3)
    assert last["eval_fve_in_sample"] == pytest.approx(found["fve_in_sample_av"], abs=1e-4)
    assert abs(found["fve_av"] - found["fve_in_sample_av"]) > 1e-2, "what each is a fraction of makes a difference"
    assert found["fve_baseline"] == "training_rows"
    assert found["fve_baseline_rows"] == 48 - Table.open(held_out, "rl").n_rows
    # The frozen AR is the one that RL began with: it makes of the same texts what an evaluation with it alone finds.
    before = f"ar={stacked / 'sft' / 'ar'}"
    done = command("eval", trained[0], before, f"data={held_out}", f"out={tmp_path / 'frozen'}", "rows=8", *LONGER)
    assert done.returncode == 0, done.stderr
    rows, alone = (json.loads((tmp_path / out / "rows.json").read_text()) for out in ("eval", "frozen"))
    assert rows["mse_frozen_ar"] == pytest.approx(alone["mse_av"], abs=1e-5) and rows["mse_frozen_ar"] != rows["mse_av"]


@pytest.fixture(scope="module")
def varying(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model as AV and AR, a table whose rows keep one to three activations, RL and an evaluation."""
    out = tmp_path_factory.mktemp("varying")
    base = tiny_model(out / "base")
    data, texts = (
        tiny_table(out / f"{stage}.parquet", base, stage, tiny_rows(64, positions=3, fewest=1))
        for stage in ("rl", "ar_sft")
    )  # fmt: skip
    shutil.copytree(base, out / "av")
    sidecar, table = read_model_sidecar(tiny_model_sidecar(out / "av", base, "av")), read_dataset_sidecar(data)
    write_model_sidecar(out / "av", replace(sidecar, tokens=table.tokens, pool=table.pool))
    corpus = [json.dumps({"doc_id": name, "text": topics[name][:80]}) for name in sorted(topics)[:12]]
    (out / "corpus.jsonl").write_text("\n".join(corpus))
    for words in (
        ("extract", f"model={base}", f"corpus={out / 'corpus.jsonl'}", "layer=2", "pool=stack", "pool_window=3",
         "pool_least=1", "min_position=0", "max_length=7", "long_documents=window", "positions_per_doc=3",
         "batch_size=5", "parallel=tp2", f"out={out / 'extract'}"),
        ("sft", "role=ar", f"model={base}", f"data={texts}", f"out={out / 'sft'}", "steps=1", "batch_size=4"),
        ("rl", f"av={out / 'av'}", f"ar={out / 'sft' / 'hf'}", f"data={data}", f"out={out / 'rl'}", "steps=2",
         "batch_size=6",
         "samples_per_prompt=2", "micro_batch_size=5", "rollout.max_logprob_gap=1e-3", "optim.lr=1e-2",
         "optim.warmup_steps=0", "rollout.record=true", f"held_out={data}", "eval_every=1", "eval_rows=4",
         "parallel=pp2", "+reward.terms.planted.term=tests.support.planted:share_of_class", *ROLLOUT),
        ("eval", f"av={out / 'rl' / 'av'}", f"ar={out / 'rl' / 'ar'}", f"data={data}", f"out={out / 'eval'}", "rows=9",
         "examples=9", *ROLLOUT),
    ):  # fmt: skip
        done = command(*words)
        assert done.returncode == 0, done.stderr
    return out


def test_extract_keeps_the_hidden_states_of_as_many_positions_as_there_are(varying: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(varying / "base"), load_tokenizer(varying / "base")
    table = Table.open(varying / "extract" / "base.parquet", "base")
    assert read_dataset_sidecar(varying / "extract" / "base.parquet").pool == PoolSpec("stack", 3, 1)
    assert set(table.activations) == {1, 2, 3}
    ids = {name: tokenizer.encode(topics[name][:80], special=True) for name in sorted(topics)[:12]}
    rows = zip(
        table.column(columns.DOC_ID), table.column(columns.N_RAW_TOKENS), table.column(columns.TEXT), strict=True
    )
    for row, (doc_id, stop, text) in enumerate(rows):
        # A document is cut into windows of 7 tokens, and the row's text says in which one it is.
        windows = [ids[doc_id][start : start + 7] for start in range(0, len(ids[doc_id]), 7)]
        window = next(each for each in windows if tokenizer.decode(each[:stop]) == text)
        with torch.no_grad():
            states_TD = model(torch.tensor([window]), output_hidden_states=True).hidden_states[3][0]
        kept_KD = np.concatenate([*table.preceding([row]), *table.vectors([row])]).reshape(-1, 64)
        np.testing.assert_allclose(kept_KD, states_TD[max(stop - 3, 0) : stop], atol=1e-4)


def test_sampler_and_trainer_inject_as_many_activations_as_a_row_has(varying: Path) -> None:
    steps = [json.loads(line) for line in (varying / "rl" / "metrics.jsonl").read_text().splitlines()]
    assert [(step["injected"], step["expected_injections"]) for step in steps] == [(12, 12)] * 2
    assert all(step["logprob_gap_max"] <= 2e-4 for step in steps)
    pool = PoolSpec("stack", 3, 1)
    assert [read_model_sidecar(varying / "rl" / role).pool for role in ("av", "ar")] == [pool] * 2


def test_what_is_sampled_equals_a_model_with_each_activation_put_at_its_marker_by_hand(varying: Path) -> None:
    rows = tiny_rows(64, positions=3, fewest=1)
    model, marker = Hooked(varying / "base"), tiny_contract(varying / "base").marker_id
    lines = (varying / "rl" / "rollouts" / "step_00000000.jsonl").read_text().splitlines()
    seen = set()
    for rollout in map(json.loads, lines):
        before, own = rows[columns.PRECEDING][rollout["row"]], rows[columns.VECTOR][rollout["row"]]
        vectors_KD = torch.from_numpy(np.concatenate([before, own])).reshape(-1, 64)
        places = [at for at, token in enumerate(rollout["prompt_ids"]) if token == marker]
        assert len(places) == len(vectors_KD)
        given = torch.tensor(rollout["logprobs"])

        def gap(order: list[int], rollout: Any = rollout, vectors_KD: torch.Tensor = vectors_KD,
                places: list[int] = places, given: torch.Tensor = given) -> float:  # fmt: skip
            changes = [
                Change(1, norm_add, vectors_KD[index], lambda t, at=at: 1.0 if t == at else None)  # type: ignore[misc]
                for at, index in zip(places, order, strict=True)
            ]
            return float((model.logprobs(rollout["prompt_ids"], rollout["response_ids"], changes) - given).abs().max())

        order = list(range(len(places)))
        assert gap(order) <= 1e-4
        assert len(places) == 1 or gap(order[::-1]) > 1e-3
        seen.add(len(places))
    assert seen == {1, 2, 3}


def test_texts_of_another_row_s_activations_have_that_row_s_number(varying: Path) -> None:
    found = json.loads((varying / "eval" / "eval.json").read_text())
    assert found["injected"] == found["expected_injections"] == 18
    task = NlaTask.open(str(varying / "rl.parquet"), "rl", str(varying / "base"))
    rows = json.loads((varying / "eval" / "rows.json").read_text())["rows"]
    counts, others = (task.table.activations[order].tolist() for order in (rows, deranged(rows, 0)))
    assert counts != others and sorted(counts) == sorted(others)
    requests = task.requests(deranged(rows, 0), 0, 0)
    assert [len(request.positions) for request in requests] == others


@pytest.fixture(scope="module")
def projected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables whose activations go through a projection of two layers at each of two blocks, warm start, RL, evaluation.

    With a block on each of two stages, and a sampler on each rank.
    """
    out = tmp_path_factory.mktemp("projected")
    base = tiny_model(out / "base")
    source = tiny_table(out / "explained.parquet", base, "explained", tiny_rows(64, 40, 3))
    build, held_out = out / "build", f"data={out / 'build' / 'held_out.parquet'}"
    for words in (
        ("build", f"input={source}", f"model={base}", f"out={build}", "held_out=0.2",
         f"templates.av='{AV_TEMPLATE}'", f"templates.ar='{AR_TEMPLATE}'", "intervention=project",
         "intervention.layers=[0,2]", "intervention.projection.layers=2", "intervention.projection.dropout=0.1"),
        ("sft", "role=both", f"model={base}", f"data={build / 'av_sft.parquet'}", f"ar_data={build / 'ar_sft.parquet'}",
         f"out={out / 'sft'}", "steps=3", "batch_size=4", "optim.lr=1e-3", "parallel=pp2"),
        ("rl", f"av={out / 'sft' / 'av'}", f"ar={out / 'sft' / 'ar'}", f"data={build / 'rl.parquet'}",
         f"out={out / 'rl'}", "steps=2", "batch_size=3", "samples_per_prompt=2", "rollout.max_logprob_gap=1e-3",
         "optim.lr=1e-2", "optim.warmup_steps=0", "save_every=1", "parallel=pp2",
         # So small a model explains nothing, and all of its reconstructions are worth the same.
         "+reward.terms.planted.term=tests.support.planted:share_of_class", *ROLLOUT),
        ("eval", f"av={out / 'rl' / 'av'}", f"ar={out / 'rl' / 'ar'}", held_out, f"out={out / 'eval'}", "rows=8",
         *ROLLOUT),
    ):  # fmt: skip
        done = command(*words)
        assert done.returncode == 0, done.stderr
    return out


def projections(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / PROJECTION_FILE)


def test_sampler_and_trainer_project_alike_after_every_update(projected: Path) -> None:
    steps = [json.loads(line) for line in (projected / "rl" / "metrics.jsonl").read_text().splitlines()]
    assert [(step["injected"], step["expected_injections"]) for step in steps] == [(6, 6)] * 2
    assert all(step["logprob_gap_max"] <= 2e-4 for step in steps)
    # The reference has the projection that the run started from.
    assert abs(steps[0]["kl"]) <= 1e-6 < steps[1]["kl"]
    found = json.loads((projected / "eval" / "eval.json").read_text())
    assert found["injected"] == found["expected_injections"] == 16


def test_the_projection_that_is_exported_is_the_trained_one(projected: Path) -> None:
    from torch.distributed.checkpoint import load

    start = {
        f"{number}.{name}": tensor
        for number in range(2)
        for name, tensor in Projection(64, 64, 2, seed=number).state_dict().items()
    }
    taught, learned = projections(projected / "sft" / "av"), projections(projected / "rl" / "av")
    assert set(taught) == set(learned) == set(start)
    kept = {f"projections.{name}": torch.empty_like(tensor) for name, tensor in learned.items()}
    load(kept, checkpoint_id=projected / "rl" / "checkpoints" / "step_00000002" / "av", no_dist=True)
    for name, tensor in learned.items():
        assert torch.equal(tensor, kept[f"projections.{name}"])
        for one, other in ((taught[name], start[name]), (tensor, taught[name])):
            assert float((one - other).abs().max()) > 1e-4, name
    specs = {read_model_sidecar(projected / stage / "av").injection for stage in ("sft", "rl")}
    assert specs == {InjectionSpec("project", 0, 1.0, (0, 2), ProjectionSpec("norm_add", 2, 0.1))}
