"""Shares, prompts, and what the engine is started with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nla_megatron.config.schema import InterventionConfig
from nla_megatron.contract.tokenizer import wrapped
from nla_megatron.errors import ColumnError, InjectionError, VersionError
from nla_megatron.interventions.schedules import Schedule
from nla_megatron.interventions.spec import Intervention
from nla_megatron.rollout.accounting import salt_of
from nla_megatron.rollout.plugin import TESTED, check_version
from nla_megatron.rollout.requests import PromptRequest, Terms, as_interventions, encode, shares
from nla_megatron.types import Rollout


@given(st.lists(st.integers(1, 4000), max_size=40), st.integers(1, 6))
def test_shares_deal_every_item_once_and_differ_by_at_most_the_largest(weights: list[int], replicas: int) -> None:
    dealt = shares(weights, replicas)
    assert sorted(index for share in dealt for index in share) == list(range(len(weights)))
    loads = [sum(weights[index] for index in share) for share in dealt]
    assert max(loads) - min(loads) <= max(weights, default=0)


def test_shares_balance_tokens_and_not_requests() -> None:
    assert shares([100, 10, 10, 10, 10, 60], 2) == [[0], [1, 2, 3, 4, 5]]


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    loaded = PreTrainedTokenizerFast.from_pretrained(model_dir)
    # One that puts a beginning before every text, as Llama's and Gemma's do.
    from tokenizers.processors import TemplateProcessing

    begin = loaded.convert_ids_to_tokens(1)
    loaded.bos_token = begin
    loaded.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, loaded.bos_token_id)]
    )
    loaded.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    return loaded


def test_text_that_writes_its_beginning_out_gets_no_second_one(tokenizer: Any) -> None:
    bos = tokenizer.bos_token_id
    plain = encode(tokenizer, "with statement")
    assert plain[0] == bos and plain.count(bos) == 1
    assert encode(tokenizer, f"{tokenizer.bos_token}with statement") == plain


def test_a_chat_begins_once_and_ids_stay_what_they_are(tokenizer: Any) -> None:
    bos = tokenizer.bos_token_id
    chat = encode(tokenizer, [{"role": "user", "content": "with"}])
    assert chat[0] == bos and chat.count(bos) == 1
    assert tokenizer.decode(chat[1:]).strip() == "user: with"
    assert encode(tokenizer, [bos, bos, 7]) == (bos, bos, 7)


def test_whichever_end_a_response_has_is_no_part_of_its_text(tokenizer: Any) -> None:
    asked, words = PromptRequest(0, 0, (1, 2), None, 0), tokenizer("with", add_special_tokens=False)["input_ids"]
    for ids, text in (([*words, 3], "with"), ([*words, 4], "with"), (words, "with"), ([3], "")):
        rollout = asked.answered(0, ids, [0.0] * len(ids), True, wrapped(tokenizer), (3, 4))
        assert rollout.text == text and rollout.response_ids == tuple(ids)


def salt(**changed: Any) -> str:
    asked: dict[str, Any] = {
        "interventions": [Intervention(1)], "vectors": [np.ones(4, np.float32)], "strengths": [(1.0,)],
        "positions": (3,), "prompt_tokens": 9,
    }  # fmt: skip
    return salt_of(**asked | changed)


def test_a_salt_is_that_of_the_content() -> None:
    assert salt() == salt(vectors=[np.ones(4, np.float64).astype(np.float32)])
    # What comes after a marker does not change what its block holds.
    assert salt() == salt(prompt_tokens=10)


@pytest.mark.parametrize(
    "changed",
    [
        {"vectors": [np.array([1, 1, 1, 1.0000001], np.float32)]},
        {"vectors": [None]},
        {"strengths": [(1.5,)]},
        {"strengths": [None]},
        {"positions": (4,)},
        {"interventions": [Intervention(2)]},
        {"interventions": [Intervention(1, "add")]},
    ],
    ids=str,
)
def test_another_intervention_is_another_salt(changed: dict[str, Any]) -> None:
    assert salt(**changed) != salt()


def test_where_the_prompt_ends_is_part_of_the_salt_if_an_intervention_ends_there() -> None:
    generated = [Intervention(1, where="generated")]
    assert salt(interventions=generated) != salt(interventions=generated, prompt_tokens=10)


def test_a_strength_over_training_is_that_of_the_step_and_part_of_the_salt() -> None:
    fading = Intervention(1, "norm_add", strength=2.0, schedule=Schedule("linear", "training", 1.0, 0.0, 10))
    terms, request = Terms((fading,), 4, 64), PromptRequest(0, 0, (5, 6, 7), 1, 0)
    vectors = np.ones((1, 4), dtype=np.float32)
    asked = [terms.asked([request], 1, lambda rows: vectors, None, step)["0"] for step in (0, 5, 10)]
    assert [one.strengths for one in asked] == [((2.0,),), ((1.0,),), ((0.0,),)]
    assert len({one.salt for one in asked}) == 3


def test_the_configurations_intervention_is_one_of_many() -> None:
    assert as_interventions(InterventionConfig("add", 2, 0.5)) == (Intervention(2, "add", strength=0.5),)
    two = [Intervention(0), Intervention(1)]
    assert as_interventions(two) == tuple(two)


@pytest.mark.parametrize("found", ["0.31.1", "0.33.0", "0.32.0rc1"])
def test_an_untested_vllm_is_refused_with_those_that_work(found: str) -> None:
    with pytest.raises(VersionError, match=rf"vLLM {found}[\s\S]*{TESTED[0]}"):
        check_version(found)


def test_builds_of_a_tested_vllm_are_taken() -> None:
    check_version("0.32.0")
    check_version("0.32.0+cpu")


def test_a_recorded_rollout_is_scored_as_it_was_asked_for() -> None:
    asked = PromptRequest(3, 8, (1, 2, 3), 1, 77, (2,), (0,), ((0.5,), None), samples=4, greedy=True)
    rollout = Rollout(5, 1, 9, (1, 2, 3, 4), (6,), (-0.1,), "six", True)
    again = asked.again(rollout)
    assert (again.group, again.row, again.prompt_ids, again.samples, again.greedy) == (5, 9, (1, 2, 3, 4), None, False)
    assert (again.position, again.more_positions, again.only, again.strengths) == (1, (2,), (0,), ((0.5,), None))


def test_a_salt_is_of_every_vector_that_enters() -> None:
    terms = Terms((Intervention(1, vectors=2),), 4, 64)
    vectors = np.ones((3, 2, 4), dtype=np.float32)
    vectors[1, 0, 2] = 2.0  # another before the same own one
    vectors[2] = vectors[1, ::-1]  # the same two the other way round
    requests = [PromptRequest(row, row, (5, 6, 7), 0, 0, (2,)) for row in range(3)]
    terms.check(requests, 1, [4] * 3)
    asked = terms.asked(requests, 1, lambda rows: vectors[list(rows)], None, 0)
    assert len({each.salt for each in asked.values()}) == 3
    for row, each in enumerate(asked.values()):
        assert each.positions == (0, 2)
        np.testing.assert_array_equal(each.vectors[0], vectors[row])


def test_several_vectors_are_projected_one_by_one_and_a_single_one_is_the_own() -> None:
    terms = Terms((Intervention(1, "project", vectors=2, vector_width=3), Intervention(0, vectors=1)), 3, 64)
    vectors, w = np.arange(12, dtype=np.float32).reshape(2, 2, 3), np.float32([[0, 1, 0], [2, 0, 0], [0, 0, 1]])
    requests = [PromptRequest(row, row, (5, 6, 7), 0, 0, (2,)) for row in range(2)]
    maps = {0: w}
    asked = terms.asked(requests, 1, lambda rows: vectors[list(rows)], lambda number, raw: raw @ maps[number].T, 0)
    for row, each in enumerate(asked.values()):
        projected, own = each.vectors
        np.testing.assert_array_equal(projected, [w @ vectors[row, 0], w @ vectors[row, 1]])
        np.testing.assert_array_equal(own, vectors[row, 1])


def of_one_to_three() -> tuple[np.ndarray, list[PromptRequest]]:
    """Rows that bring one, two and three vectors, with a position for each."""
    vectors = np.arange(1, 28, dtype=np.float32).reshape(3, 3, 3)
    vectors[0, :2] = vectors[1, :1] = np.nan
    places = [(), (2,), (2, 4)]
    return vectors, [PromptRequest(row, row, (5, 6, 7, 8, 9), 0, 0, places[row]) for row in range(3)]


def test_rows_bring_from_one_to_three_vectors_each_with_a_position() -> None:
    interventions = (
        Intervention(1, vectors=3, fewest=1), Intervention(2, "project", vectors=3, fewest=1), Intervention(0)
    )  # fmt: skip
    terms, (vectors, requests) = Terms(interventions, 3, 64), of_one_to_three()
    terms.check(requests, 1, [4] * 3)
    w = np.float32([[0, 1, 0], [2, 0, 0], [0, 0, 1]])
    asked = terms.asked(requests, 1, lambda rows: vectors[list(rows)], lambda number, raw: raw @ w.T, 0)
    for row, each in enumerate(asked.values()):
        several, projected, own = each.vectors
        assert several is not None and projected is not None and len(each.positions) == row + 1
        np.testing.assert_array_equal(several[2 - row :], vectors[row, 2 - row :])
        np.testing.assert_array_equal(projected[2 - row :], vectors[row, 2 - row :] @ w.T)
        np.testing.assert_array_equal(own, vectors[row, 2])
        assert np.isfinite(several).all() and np.isfinite(projected).all()


def test_a_request_that_brings_more_or_fewer_vectors_than_positions_is_refused() -> None:
    terms, (vectors, requests) = Terms((Intervention(1, vectors=3, fewest=1),), 3, 64), of_one_to_three()
    fewer = replace(requests[2], more_positions=(2,))
    with pytest.raises(InjectionError, match=r"2 positions of group 2 \(row 2\), which brings 3 activations"):
        terms.asked([fewer], 1, lambda rows: vectors[list(rows)], None, 0)
    more = replace(requests[1], more_positions=(2, 4))
    with pytest.raises(ColumnError, match=r"1 of 3 vectors cannot be injected; the first, of request group 1"):
        terms.asked([more], 1, lambda rows: vectors[list(rows)], None, 0)


def test_a_prompt_with_a_token_that_the_model_has_no_row_for_is_refused() -> None:
    terms = Terms((), 8, 100, vocab_size=600)
    terms.check([PromptRequest(0, 0, (1, 599), None, 0)], 1, [4])
    with pytest.raises(ColumnError, match="token id 600"):
        terms.check([PromptRequest(0, 0, (1, 600, 2), None, 0)], 1, [4])
