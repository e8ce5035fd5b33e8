from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from nla_megatron.contract.markers import repeated, several_markers
from nla_megatron.contract.prompts import (
    AR_TEMPLATE,
    AV_TEMPLATE,
    INJECT,
    PromptContract,
    choose_marker,
    extract_explanation,
    marker_neighbours,
    wrap_explanation,
)
from nla_megatron.errors import ConfigError, MarkerError, SidecarError

MARKER = "㈎"
Tok = PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def contract(tokenizer: Tok) -> PromptContract:
    return PromptContract.derive(tokenizer, AV_TEMPLATE, AR_TEMPLATE)


@given(st.text(min_size=1).filter(lambda text: text.strip() and "explanation>" not in text))
def test_what_is_wrapped_is_extracted(text: str) -> None:
    assert extract_explanation(wrap_explanation(text)) == text.strip()


def test_the_wrapping_is_the_one_of_the_contract() -> None:
    assert wrap_explanation("two words") == "<explanation>\ntwo words\n</explanation>"


@pytest.mark.parametrize(
    "response",
    [
        "",
        "a",
        "<explanation>cut off",
        "closing only</explanation>",
        "<explanation> \n </explanation>",
        "before <explanation>a</explanation>",
        "<explanation>a</explanation> after",
        "<explanation>a</explanation><explanation>b</explanation>",
        "<explanation><explanation>a</explanation>",
        "<explanation>a</explanation></explanation>",
        "</explanation>a<explanation>",
        "<explanation></explanation>",
        "<explanation>",
    ],
)
def test_anything_but_one_tagged_explanation_fails(response: str) -> None:
    assert extract_explanation(response) is None


def test_whitespace_around_the_tags_is_allowed() -> None:
    assert extract_explanation(" \n<explanation>a b</explanation>\n\n") == "a b"


def test_the_first_single_token_character_of_the_range_is_chosen(make_tokenizer: Callable[..., Tok]) -> None:
    assert choose_marker(make_tokenizer(added=("㊗", "㈜")), AV_TEMPLATE) == "㈜"  # U+321C before U+3297


def test_a_marker_that_stands_in_the_template_already_is_passed_over(make_tokenizer: Callable[..., Tok]) -> None:
    assert choose_marker(make_tokenizer(added=("㈎", "㈜")), f"㈎ <concept>{INJECT}</concept>") == "㈜"


def test_a_given_marker_of_several_tokens_is_refused(split_marker_tokenizer: Tok) -> None:
    with pytest.raises(MarkerError, match=MARKER):
        PromptContract.derive(split_marker_tokenizer, AV_TEMPLATE, AR_TEMPLATE, marker=MARKER)


def test_a_marker_that_is_unknown_or_decodes_to_another_text_is_refused(make_tokenizer: Callable[..., Tok]) -> None:
    unknown = make_tokenizer()
    unknown.unk_token = MARKER
    with pytest.raises(MarkerError):
        marker_neighbours(unknown, AV_TEMPLATE, MARKER)
    from tokenizers import decoders

    lossy = make_tokenizer()
    lossy.backend_tokenizer.decoder = decoders.Sequence([decoders.Replace(MARKER, "?"), decoders.Fuse()])
    with pytest.raises(MarkerError):
        marker_neighbours(lossy, AV_TEMPLATE, MARKER)


def test_a_marker_at_the_edge_or_twice_is_refused(make_tokenizer: Callable[..., Tok]) -> None:
    bare = make_tokenizer(chat="{{ messages[0]['content'] }}")
    with pytest.raises(MarkerError, match="position 0"):
        PromptContract.derive(bare, f"{INJECT} text", marker=MARKER)
    echo = make_tokenizer(chat="{{ messages[0]['content'] }} {{ messages[0]['content'] }}")
    with pytest.raises(MarkerError, match="2 times"):
        PromptContract.derive(echo, f"a {INJECT} b", marker=MARKER)


def test_neighbours_are_the_ids_beside_the_marker(tokenizer: Tok, contract: PromptContract) -> None:
    text = tokenizer.apply_chat_template(contract.messages(), tokenize=False, add_generation_prompt=True)
    before, after = text.replace(INJECT, MARKER).split(MARKER)
    # Added tokens cut the text before BPE, so either side can be encoded on its own.
    left = tokenizer(before, add_special_tokens=False)["input_ids"]
    right = tokenizer(after, add_special_tokens=False)["input_ids"]
    assert (contract.left_id, contract.right_id) == (left[-1], right[0])
    assert contract.av_prompt_ids(tokenizer) == [*left, tokenizer.convert_tokens_to_ids(MARKER), *right]
    assert contract.marker_position(contract.av_prompt_ids(tokenizer)) == len(left)


def test_messages_hold_the_placeholder_and_may_be_given_back(tokenizer: Tok, contract: PromptContract) -> None:
    messages = contract.messages()
    assert messages == [{"role": "user", "content": AV_TEMPLATE}]
    assert contract.av_prompt_ids(tokenizer, messages) == contract.av_prompt_ids(tokenizer)
    longer = [{"role": "system", "content": "Be short."}, *messages]
    ids = contract.av_prompt_ids(tokenizer, longer)
    assert ids[contract.marker_position(ids)] == contract.marker_id
    assert len(ids) > len(contract.av_prompt_ids(tokenizer))


def test_there_is_one_bos_where_the_chat_template_writes_it(bos_tokenizer: Tok) -> None:
    contract = PromptContract.derive(bos_tokenizer, AV_TEMPLATE, AR_TEMPLATE)
    ids = contract.av_prompt_ids(bos_tokenizer)
    assert ids[0] == bos_tokenizer.bos_token_id
    assert ids.count(bos_tokenizer.bos_token_id) == 1


def test_the_bos_policy_is_the_tokenizers_and_decides_about_the_ar_prompt(tokenizer: Tok, bos_tokenizer: Tok) -> None:
    with_bos = PromptContract.derive(bos_tokenizer, AV_TEMPLATE, AR_TEMPLATE)
    without = PromptContract.derive(bos_tokenizer, AV_TEMPLATE, AR_TEMPLATE, bos_policy="none")
    assert (with_bos.bos_policy, without.bos_policy) == ("tokenizer", "none")
    assert PromptContract.derive(tokenizer, AV_TEMPLATE, AR_TEMPLATE).bos_policy == "none"
    ids = with_bos.ar_ids(bos_tokenizer, "a word")
    assert ids == [bos_tokenizer.bos_token_id, *without.ar_ids(bos_tokenizer, "a word")]
    assert without.ar_ids(bos_tokenizer, "a word") == bos_tokenizer.encode(
        AR_TEMPLATE.format(explanation="a word"), add_special_tokens=False
    )
    without.check(bos_tokenizer)  # a checkpoint trained without BOS stays usable


@settings(max_examples=200)
@given(explanation=st.text(max_size=30))
def test_every_ar_prompt_ends_with_the_suffix(tokenizer: Tok, contract: PromptContract, explanation: str) -> None:
    ids = contract.ar_ids(tokenizer, explanation)
    assert tuple(ids[-len(contract.ar_suffix_ids) :]) == contract.ar_suffix_ids


def test_the_suffix_leaves_out_ids_that_merge_with_the_explanation(make_tokenizer: Callable[..., Tok]) -> None:
    """`.</` is one token here, so that `</` is in the suffix of some explanations and not of others."""
    tokenizer = make_tokenizer(added=(MARKER, ".</", "</"))
    contract = PromptContract.derive(tokenizer, AV_TEMPLATE, AR_TEMPLATE)
    assert tokenizer.decode(list(contract.ar_suffix_ids)) == "text> <summary>"
    assert (
        tokenizer.decode(contract.ar_ids(tokenizer, "a.")[-len(contract.ar_suffix_ids) - 1 :]) == ".</text> <summary>"
    )


def test_an_ar_prompt_with_another_end_is_refused(tokenizer: Tok, contract: PromptContract) -> None:
    broken = replace(contract, ar_suffix_ids=(*contract.ar_suffix_ids[:-1], 0))
    with pytest.raises(SidecarError, match="ar_suffix_ids"):
        broken.ar_ids(tokenizer, "a word")


def test_an_explanation_with_braces_is_taken_literally(tokenizer: Tok, contract: PromptContract) -> None:
    ids = contract.ar_ids(tokenizer, "{explanation} {0} }{")
    assert tokenizer.decode(ids) == "Summary of the following text: <text>{explanation} {0} }{</text> <summary>"


def test_a_response_ends_with_one_end_token(bos_tokenizer: Tok, contract: PromptContract) -> None:
    ids = contract.av_response_ids(bos_tokenizer, wrap_explanation("a word"))
    assert ids[-1] == bos_tokenizer.eos_token_id
    assert bos_tokenizer.decode(ids[:-1]) == "<explanation>\na word\n</explanation>"


def test_a_marker_that_the_policy_writes_is_not_injected_into(tokenizer: Tok, contract: PromptContract) -> None:
    prompt = contract.av_prompt_ids(tokenizer)
    response = contract.av_response_ids(tokenizer, f"see <concept>{MARKER}</concept> there")
    assert contract.marker_id in response
    assert contract.marker_position([*prompt, *response], len(prompt)) == contract.marker_position(prompt)
    with pytest.raises(MarkerError, match="exactly one position"):
        contract.marker_position([*prompt, *response])


def test_a_marker_without_its_neighbours_is_not_the_place(tokenizer: Tok, contract: PromptContract) -> None:
    prompt = contract.av_prompt_ids(tokenizer)
    position = contract.marker_position(prompt)
    assert contract.marker_position([0, contract.marker_id, 0, *prompt]) == position + 3
    for offset in (-1, 1):
        moved = [*prompt]
        moved[position + offset] = tokenizer.bos_token_id
        with pytest.raises(MarkerError, match=r"positions \[\]"):
            contract.marker_position(moved)


def test_the_check_passes_with_its_own_tokenizer_and_names_what_differs_with_another(
    tokenizer: Tok, other_tokenizer: Tok, contract: PromptContract
) -> None:
    contract.check(tokenizer)
    live = other_tokenizer.convert_tokens_to_ids(MARKER)
    with pytest.raises(SidecarError) as caught:
        contract.check(other_tokenizer)
    assert f"marker_id = {contract.marker_id}" in caught.value.found
    assert f"marker_id = {live}" in caught.value.expected


@pytest.mark.parametrize("name", ["marker_id", "left_id", "right_id", "ar_suffix_ids", "bos_policy"])
def test_the_check_sees_every_field(tokenizer: Tok, contract: PromptContract, name: str) -> None:
    wrong = {"ar_suffix_ids": (*contract.ar_suffix_ids[:-1], 1), "bos_policy": "tokenizer"}.get(name, 1)
    with pytest.raises(SidecarError, match=f"records {name} ="):
        replace(contract, **{name: wrong}).check(tokenizer)


def test_the_check_refuses_a_tokenizer_that_splits_the_marker(
    split_marker_tokenizer: Tok, contract: PromptContract
) -> None:
    with pytest.raises(MarkerError, match="encodes to"):
        contract.check(split_marker_tokenizer)


def test_suffixes_of_other_lengths_agree_when_their_ids_do(tokenizer: Tok, contract: PromptContract) -> None:
    replace(contract, ar_suffix_ids=contract.ar_suffix_ids[1:]).check(tokenizer)
    replace(contract, ar_suffix_ids=()).check(tokenizer)
    plain = tuple(contract.ar_ids(tokenizer, "Words."))
    longer = plain[-len(contract.ar_suffix_ids) - 1 :]
    replace(contract, ar_suffix_ids=longer).check(tokenizer)
    with pytest.raises(SidecarError, match="ar_suffix_ids"):
        replace(contract, ar_suffix_ids=(7, *contract.ar_suffix_ids)).check(tokenizer)


@pytest.mark.parametrize("template", ["no place", f"{INJECT} and {INJECT}"])
def test_an_av_template_needs_one_place(tokenizer: Tok, template: str) -> None:
    with pytest.raises(ConfigError, match="AV template"):
        PromptContract.derive(tokenizer, template, AR_TEMPLATE)


@pytest.mark.parametrize(
    "template",
    [
        "no slot end",
        "{explanation} {explanation} end",
        "{explanation} {} end",
        "{explanation!r} end",
        "a } {explanation} b",
    ],
)
def test_an_ar_template_needs_one_slot(tokenizer: Tok, template: str) -> None:
    with pytest.raises(ConfigError, match="AR template"):
        PromptContract.derive(tokenizer, AV_TEMPLATE, template)


def test_an_ar_template_without_a_fixed_end_is_refused(tokenizer: Tok) -> None:
    with pytest.raises(ConfigError, match="depends on the explanation"):
        PromptContract.derive(tokenizer, AV_TEMPLATE, "Summary: {explanation}")


def test_a_tokenizer_without_chat_template_or_end_token_is_refused(make_tokenizer: Callable[..., Tok]) -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        PromptContract.derive(make_tokenizer(chat=None), AV_TEMPLATE, AR_TEMPLATE)
    endless = make_tokenizer()
    contract = PromptContract.derive(endless, AV_TEMPLATE, AR_TEMPLATE)
    endless.eos_token = None
    with pytest.raises(ConfigError, match="EOS"):
        contract.av_response_ids(endless, "a")


def test_several_markers_have_the_same_neighbours_and_positions_of_their_own(tokenizer: Tok) -> None:
    template = several_markers(AV_TEMPLATE, 3)
    assert template.count(INJECT) == 3 and several_markers(AV_TEMPLATE, 1) == AV_TEMPLATE
    contract = PromptContract.derive(tokenizer, template, positions=3)
    contract.check(tokenizer)
    ids = contract.av_prompt_ids(tokenizer)
    positions = contract.marker_positions(ids)
    assert list(positions) == [at for at, one in enumerate(ids) if one == contract.marker_id] and len(positions) == 3
    with pytest.raises(MarkerError, match="3 positions"):
        contract.marker_positions(ids[: positions[2]])


def test_a_number_of_markers_that_nobody_asked_for_is_refused(tokenizer: Tok) -> None:
    twice = several_markers(AV_TEMPLATE, 2)
    with pytest.raises(ConfigError, match="2 times"):
        PromptContract.derive(tokenizer, twice)
    with pytest.raises(ConfigError, match="1 times"):
        PromptContract.derive(tokenizer, AV_TEMPLATE, positions=2)
    with pytest.raises(MarkerError, match="same neighbours"):
        PromptContract.derive(tokenizer, f"a {INJECT} b, ({INJECT})", positions=2)


def test_a_prompt_repeats_its_marker_for_each_activation_of_a_row(tokenizer: Tok) -> None:
    contract = PromptContract.derive(tokenizer, repeats=(1, 5))
    contract.check(tokenizer)
    assert contract.templates_av == AV_TEMPLATE and contract.positions == 1
    for count in range(1, 6):
        fixed = PromptContract.derive(tokenizer, several_markers(AV_TEMPLATE, count), positions=count)
        assert (contract.left_id, contract.right_id) == (fixed.left_id, fixed.right_id)
        assert contract.messages(count) == fixed.messages()
        ids = contract.av_prompt_ids(tokenizer, activations=count)
        assert ids == fixed.av_prompt_ids(tokenizer)
        assert contract.marker_positions(ids, activations=count) == fixed.marker_positions(ids)
    with pytest.raises(MarkerError, match=r"stand at positions[\s\S]*2 positions"):
        contract.marker_positions(ids, activations=2)


@pytest.mark.parametrize("count", [0, 1, 6])
def test_a_prompt_for_more_or_fewer_activations_than_are_recorded_is_refused(tokenizer: Tok, count: int) -> None:
    contract = PromptContract.derive(tokenizer, repeats=(2, 5))
    with pytest.raises(MarkerError, match=f"a prompt for {count} activations[\\s\\S]*2 to 5"):
        contract.messages(count)


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (f"an activation {INJECT} there", "word '<INJECT>', which cannot be repeated"),
        (f"an activation <{INJECT} there", "word '<<INJECT>', which cannot be repeated"),
        (several_markers(AV_TEMPLATE, 2), "holds <INJECT> 2 times"),
        ("none", "holds <INJECT> 0 times"),
    ],
)
def test_a_template_that_cannot_repeat_its_marker_is_refused(tokenizer: Tok, template: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PromptContract.derive(tokenizer, template, repeats=(1, 3))
    assert told in caught.value.found


def test_the_word_that_holds_the_marker_is_what_is_repeated() -> None:
    assert repeated(f"see [{INJECT}]: {{x}}", 3) == f"see [{INJECT}]:\n[{INJECT}]:\n[{INJECT}]: {{x}}"
    assert repeated(AV_TEMPLATE, 4) == several_markers(AV_TEMPLATE, 4)


def test_a_word_whose_ends_depend_on_the_marker_s_place_is_refused(tokenizer: Tok) -> None:
    with pytest.raises(MarkerError, match="the same neighbours everywhere"):
        PromptContract.derive(tokenizer, f"It is the{INJECT}the end", repeats=(1, 3))
