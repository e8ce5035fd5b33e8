"""The trained tokenizer: whole tags, a marker, every text back as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nla_megatron.contract.prompts import PromptContract, choose_marker
from nla_megatron.contract.tokenizer import load_tokenizer
from nla_megatron.datagen.tokenizer import WHOLE_TOKENS, train_tokenizer
from tests.support.tiny import AR_TEMPLATE, AV_TEMPLATE


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(model_dir).fast


def test_the_size_is_what_was_asked_for(tmp_path: Path) -> None:
    assert train_tokenizer(["many words make many merges; " * 3] * 20, 280, tmp_path) == 280
    assert len(load_tokenizer(tmp_path)) == 280


@pytest.mark.parametrize("token", WHOLE_TOKENS)
def test_marker_and_tags_are_one_token_wherever_they_stand(tokenizer: PreTrainedTokenizerFast, token: str) -> None:
    [number] = tokenizer(token)["input_ids"]
    assert tokenizer(f"a{token}\n{token}.")["input_ids"].count(number) == 2
    # A response is decoded without special tokens, and must keep its tags.
    assert tokenizer.decode([number], skip_special_tokens=True) == token


@given(st.text())
def test_every_text_comes_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_plain_text_gets_no_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("Explain this")["input_ids"]
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_a_chat_is_framed_by_special_tokens_and_ends_where_the_assistant_speaks(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes"}]
    question: Any = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
    both: Any = tokenizer.apply_chat_template(turns, return_dict=False)
    assert both[: len(question)] == question and tokenizer.decode(both[len(question) : -1]) == "Yes"
    assert both[-1] == tokenizer.eos_token_id
    assert {question[0], question[-1]} <= set(tokenizer.all_special_ids)


def test_auto_tokenizer_loads_the_same(model_dir: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    auto = AutoTokenizer.from_pretrained(model_dir)
    turns = [{"role": "user", "content": "<concept>㈎</concept> é 中"}]
    assert auto.apply_chat_template(turns) == tokenizer.apply_chat_template(turns)
    assert (auto.eos_token_id, auto.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert auto.eos_token_id != auto.pad_token_id


def test_the_prompt_contract_holds_with_it(tokenizer: PreTrainedTokenizerFast) -> None:
    assert choose_marker(tokenizer, AV_TEMPLATE) in WHOLE_TOKENS
    contract = PromptContract.derive(tokenizer, AV_TEMPLATE, AR_TEMPLATE)
    contract.check(tokenizer)
    assert contract.bos_policy == "none" and contract.ar_suffix_ids


def test_training_is_deterministic(tmp_path: Path) -> None:
    for name in ("one", "other"):
        train_tokenizer(["the cat sat on the mat", "the dog ran"] * 5, 290, tmp_path / name)
    one, other = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("one", "other"))
    assert one == other
