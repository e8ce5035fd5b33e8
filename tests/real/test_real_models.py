"""What holds of small random models holds of two really trained ones: conversion, activations, injection, steps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nla_megatron.contract import columns
from nla_megatron.contract.corpus import read_corpus
from nla_megatron.contract.sidecar import read_dataset_sidecar
from nla_megatron.contract.tables import Table
from nla_megatron.conversion.hf import SafetensorsReader, read_shape
from nla_megatron.tasks.nla import NlaTask
from nla_megatron.training.recorder import read_rollouts
from tests.real.conftest import MAX_LENGTH, Real
from tests.support.hooked import Change, Hooked, norm_add
from tests.support.ranks import command

pytestmark = [pytest.mark.real, pytest.mark.slow]

PARAGRAPH = (
    "Paris is the capital of France. In 1889 its tower was 300 m high:\n\n    def height(year):\n        return 300\n"
)


def test_the_model_knows_what_it_was_trained_on(real: Real) -> None:
    """A wrong norm, BOS or rope survives every round trip, but not this."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real.directory)
    model = AutoModelForCausalLM.from_pretrained(real.directory, dtype=torch.float32)
    ids = tokenizer("one, two, three, four, five, six,", return_tensors="pt").input_ids
    with torch.no_grad():
        written = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    assert "seven, eight" in tokenizer.decode(written)


def test_import_and_export_give_back_every_bit(real: Real, mcore: Path) -> None:
    back = SafetensorsReader(real.run("convert export", "export", f"checkpoint={mcore}"))
    there = SafetensorsReader(real.directory)
    assert back.names() == there.names()
    assert all(torch.equal(back.whole(name), there.whole(name)) for name in there.names())


def test_logits_of_a_paragraph_are_those_of_transformers(real: Real, mcore: Path) -> None:
    """Within 2e-5 of the largest, in fp32, on layouts that the model's heads and blocks admit."""
    for layout in real.layouts:
        done = command(
            "convert", "verify", f"hf={real.directory}", f"checkpoint={mcore}", layout, f"text={PARAGRAPH}", timeout=800
        )
        assert done.returncode == 0, layout + done.stdout[-2000:] + done.stderr[-3000:]


def test_activations_are_the_hidden_states_behind_block_k(real: Real, extracted: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    table = Table.open(extracted / "base.parquet", "base")
    layer = read_dataset_sidecar(extracted / "base.parquet").extraction.layer_index
    assert layer == 2 * read_shape(real.directory).num_layers // 3
    texts = dict(read_corpus(real.out / "corpus.parquet"))
    tokenizer = AutoTokenizer.from_pretrained(real.directory)
    model = AutoModelForCausalLM.from_pretrained(real.directory, dtype=torch.float32).model
    documents, lengths = table.column(columns.DOC_ID), table.column(columns.N_RAW_TOKENS)
    for doc_id in list(dict.fromkeys(documents))[:5]:
        ids = tokenizer(texts[doc_id], truncation=True, max_length=MAX_LENGTH, return_tensors="pt").input_ids
        with torch.no_grad():
            states_TD = model(ids, output_hidden_states=True).hidden_states[layer + 1][0]
        rows = [row for row, owner in enumerate(documents) if owner == doc_id]
        expected = states_TD[[lengths[row] - 1 for row in rows]].numpy()
        np.testing.assert_allclose(table.vectors(rows), expected, atol=2e-5 * float(np.abs(expected).max()))


def test_every_activation_was_injected_and_sampler_and_trainer_agree(learned: tuple[Path, Path]) -> None:
    """The second step also proves that the sampler got what the first one learned."""
    steps = [json.loads(line) for line in (learned[1] / "metrics.jsonl").read_text().splitlines()]
    assert [step["injected"] for step in steps] == [step["expected_injections"] for step in steps] == [4, 4]
    assert all(step["logprob_gap_max"] <= 1e-4 for step in steps), [step["logprob_gap_max"] for step in steps]


def test_the_sampler_injects_as_a_hooked_transformers_model_does(
    real: Real, built: Path, learned: tuple[Path, Path]
) -> None:
    task = NlaTask.open(str(built / "rl.parquet"), "rl", str(learned[0] / "av"))
    hooked = Hooked(learned[0] / "av")
    rollouts = read_rollouts(learned[1] / "rollouts" / "step_00000000.jsonl")
    for rollout in rollouts[::2]:
        vector_D = torch.from_numpy(np.array(task.table.vectors([rollout.row])[0]))
        place = task.prompt_of(rollout.row).positions[0]
        change = Change(1, norm_add, vector_D, lambda t, place=place: 1.0 if t == place else None)
        found = torch.tensor(rollout.logprobs)
        expected = hooked.logprobs(rollout.prompt_ids, rollout.response_ids, [change])
        without = hooked.logprobs(rollout.prompt_ids, rollout.response_ids, [])
        assert float((found - expected).abs().max()) <= 1e-4 < float((found - without).abs().max())


def test_what_was_learned_is_a_model_that_can_be_evaluated(real: Real, built: Path, learned: tuple[Path, Path]) -> None:
    out = learned[1].name.replace("rl", "eval")
    found = real.run(
        out.replace("_", " ", 1), f"av={learned[1] / 'av'}", f"ar={learned[1] / 'ar'}", "rows=3",
        f"data={built / 'held_out.parquet'}", "rollout.max_new_tokens=8", "rollout.max_model_len=256",
    )  # fmt: skip
    figures = json.loads((found / "eval.json").read_text())
    assert figures["injected"] == figures["expected_injections"] == 6
    assert all(np.isfinite(figures[f"fve_{name}"]) for name in ("av", "gold", "shuffled"))
