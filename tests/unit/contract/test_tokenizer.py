"""Tokenizers as models come with them: where responses end, what their files say, what their chat templates do."""

from __future__ import annotations

import ast
import gzip
import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nla_megatron.contract.blocks import AvPromptSpec
from nla_megatron.contract.chat import render
from nla_megatron.contract.markers import INJECT, choose_marker
from nla_megatron.contract.prompts import AR_TEMPLATE, AV_PLAIN_TEMPLATE, AV_TEMPLATE, PromptContract
from nla_megatron.contract.sidecar import DatasetSidecar, prompt_contract, read_dataset_sidecar, write_dataset_sidecar
from nla_megatron.contract.tokenizer import keep_as_it_stands, load_tokenizer, read_backend, wrapped
from nla_megatron.errors import ConfigError, MarkerError, MissingFile, SidecarError
from tests.unit.contract.kinds import CHATML, KINDS, MARKER, gemma, gpt2, llama2, mistral, qwen, smollm

PACKAGE = Path(__file__).resolve().parents[3] / "nla_megatron"
PLAIN = AvPromptSpec("plain")
USER = [{"role": "user", "content": "Hello there"}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *USER]
DATED = "{% if not day is defined %}{% set day = strftime_now('%d %b %Y') %}{% endif %}Today Date: {{ day }}\n" + CHATML


def saved(tokenizer: PreTrainedTokenizerFast, directory: Path, **files: Any) -> Path:
    """A model's directory: the tokenizer, and files of JSON by their names without the ending."""
    tokenizer.save_pretrained(directory)
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def configured(directory: Path, **changes: Any) -> Path:
    path = directory / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "gone"}))
    return directory


def test_the_wrapper_alone_asks_tokenizers_for_templates_and_ends() -> None:
    """Everybody else would have to know of every end, every template's failures, and the day."""
    names = {"apply_chat_template", "eos_token_id", "AutoTokenizer", "chat_template", "PreTrainedTokenizerFast"}
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            used = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None
            if used in names:
                found.add(path.relative_to(PACKAGE).as_posix())
    make_one = {"datagen/tokenizer.py", "pretrained/gguf_tokenizer.py"}
    assert found == {"contract/chat.py", "contract/tokenizer.py"} | make_one


@pytest.mark.parametrize(
    ("kind", "marker"),
    [
        ("qwen", MARKER),  # the range that other trainers use
        ("smollm", "═"),  # a symbol, since nothing of the range is one token
        ("gpt2", "\x7f"),  # a tokenizer of bytes has every control character
        ("llama2", "給"),  # a letter, since it has no symbol
        ("mistral", "♪"),
        ("gemma", "<unused0>"),  # a reserved token
    ],
)
def test_every_kind_of_tokenizer_has_a_marker_that_is_one_token_of_its_own_in_the_prompt(
    kind: str, marker: str
) -> None:
    tokenizer = KINDS[kind]()
    form = PLAIN if tokenizer.chat_template is None else AvPromptSpec()
    template = AV_PLAIN_TEMPLATE if form == PLAIN else AV_TEMPLATE
    contract = PromptContract.derive(tokenizer, template, form=form)
    assert contract.marker == marker
    contract.check(tokenizer)
    text = template.replace(INJECT, marker)
    if form == PLAIN:
        ids = tokenizer(text)["input_ids"]
    else:
        turns = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert contract.av_prompt_ids(tokenizer) == ids
    [at] = [place for place, one in enumerate(ids) if one == contract.marker_id]
    assert contract.marker_position(ids) == at
    assert tokenizer.decode([contract.marker_id]) == marker
    assert tokenizer.decode(ids[:at]).endswith("<concept>") and tokenizer.decode(ids[at + 1 :]).startswith("</concept>")
    # The marker's own characters became this token: without it, everything else is what it was.
    assert tokenizer.bos_token_id is None or ids.count(tokenizer.bos_token_id) <= 1


def test_a_token_of_the_marker_and_what_stands_beside_it_is_not_the_markers() -> None:
    tokenizer = qwen()
    tokenizer.add_tokens([f">{MARKER}"])
    with pytest.raises(MarkerError, match=r"encodes to \[700\]"):
        PromptContract.derive(tokenizer, marker=MARKER)
    assert PromptContract.derive(tokenizer).marker not in (MARKER, f">{MARKER}")


def test_a_tokenizer_that_knows_words_alone_has_no_marker() -> None:
    core = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "concept": 2}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", eos_token="a")
    with pytest.raises(MarkerError, match=r"U\+3200[\s\S]*templates.marker"):
        PromptContract.derive(words, form=PLAIN)


def test_markers_that_no_text_can_carry_are_passed_over() -> None:
    assert choose_marker(wrapped(gpt2()), f"\x7f {INJECT} ") != "\x7f"


# Where responses end


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({}, ["<|endoftext|>"]),
        ({"generation_config": {"eos_token_id": [2, 0]}}, ["<|endoftext|>", "<|im_end|>"]),
        ({"config": {"eos_token_id": 2}}, ["<|endoftext|>", "<|im_end|>"]),
        ({"config": {"text_config": {"eos_token_id": [2]}}, "generation_config": {}}, ["<|endoftext|>", "<|im_end|>"]),
        ({"generation_config": {"eos_token_id": [2, 99999]}}, ["<|endoftext|>", "<|im_end|>"]),
    ],
)
def test_every_end_that_a_model_declares_ends_its_responses(
    tmp_path: Path, files: dict[str, Any], ends: list[str]
) -> None:
    tokenizer = qwen()
    tokenizer.eos_token = "<|endoftext|>"
    loaded = load_tokenizer(saved(tokenizer, tmp_path, **files))
    assert list(loaded.end_ids) == tokenizer.convert_tokens_to_ids(ends)
    words = loaded.encode("two words")
    for end in loaded.end_ids:
        assert loaded.text_of([*words, end]) == "two words" == loaded.text_of(words)
    assert loaded.turn_end_id == tokenizer.convert_tokens_to_ids(ends[-1]), "the template's, where it is declared"
    assert set(loaded.end_ids) <= loaded.special_ids


@pytest.mark.parametrize("value", ["</s>", 1.5, True, [1, None], -1, {"a": 1}])
def test_an_end_that_is_no_id_is_named(tmp_path: Path, value: Any) -> None:
    saved(qwen(), tmp_path, generation_config={"eos_token_id": value})
    with pytest.raises(ConfigError, match=r"eos_token_id is .* in .*generation_config.json"):
        _ = load_tokenizer(tmp_path).end_ids


@pytest.mark.parametrize(
    ("make", "end"), [(qwen, "<|im_end|>"), (llama2, "</s>"), (gpt2, "<|endoftext|>"), (gemma, "<end_of_turn>")]
)
def test_supervised_training_teaches_the_end_of_the_templates_turn(tmp_path: Path, make: Any, end: str) -> None:
    tokenizer = make()
    ends = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(["<end_of_turn>"] if make is gemma else [])]
    loaded = load_tokenizer(saved(tokenizer, tmp_path, generation_config={"eos_token_id": ends}))
    form = PLAIN if not loaded.has_chat else AvPromptSpec()
    contract = PromptContract.derive(loaded, form=form)
    ids = contract.av_response_ids(loaded, "a word")
    assert tokenizer.convert_ids_to_tokens(ids[-1]) == end and not set(ids[:-1]) & set(loaded.end_ids)


def test_a_model_whose_file_alone_names_an_end_has_one_and_without_any_it_is_named(tmp_path: Path) -> None:
    configured(saved(qwen(), tmp_path), eos_token=None)
    with pytest.raises(ConfigError, match="no end token"):
        load_tokenizer(tmp_path).check_ends()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    assert load_tokenizer(tmp_path).end_id == 2


# What the files say


def test_padding_and_truncation_in_the_file_change_no_ids(tmp_path: Path) -> None:
    directory, text = saved(qwen(), tmp_path), "many words " * 30
    expected = qwen()(text)["input_ids"]
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    content["padding"] = {
        "strategy": {"Fixed": 512}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }  # fmt: skip
    content["truncation"] = {"direction": "Left", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(content))
    loaded = load_tokenizer(directory)
    assert loaded.encode(text) == loaded.encode_each([text])[0] == loaded.encode_located([text])[0].ids == expected
    assert read_backend(path).encode(text).ids == expected
    assert PromptContract.derive(loaded).av_prompt_ids(loaded) == PromptContract.derive(qwen()).av_prompt_ids(qwen())


def test_a_vocabulary_and_merges_alone_are_a_tokenizer(tmp_path: Path) -> None:
    saved(qwen(), tmp_path, config={"model_type": "qwen2"})
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    merges = [each if isinstance(each, str) else " ".join(each) for each in content["model"]["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    added = {str(one.pop("id")): one for one in content["added_tokens"]}
    configured(tmp_path, tokenizer_class="Qwen2Tokenizer", added_tokens_decoder=added)
    loaded = load_tokenizer(tmp_path)
    assert PromptContract.derive(loaded).av_prompt_ids(loaded) == PromptContract.derive(qwen()).av_prompt_ids(qwen())


def test_extra_special_tokens_as_a_list_are_read(tmp_path: Path) -> None:
    configured(
        saved(qwen(), tmp_path), extra_special_tokens=["<|im_start|>"], tokenizer_class="PreTrainedTokenizerFast"
    )
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("<|im_start|>") == [1] and 1 in loaded.special_ids


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("tokenizer.json", None, MissingFile),
        ("tokenizer.json", "{", ConfigError),
        ("tokenizer.json", '{"model": {"type": "BPE"}}', ConfigError),
        ("tokenizer_config.json", "[]", ConfigError),
        ("tokenizer_config.json", "{", ConfigError),
        ("tokenizer_config.json", "\ufeff{}", ConfigError),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: str | None, error: type[Exception]
) -> None:
    path = saved(qwen(), tmp_path) / name
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(error, match=str(tmp_path)):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (gzip.compress(b"{}", mtime=0), "gzip"),
        ("{}".encode("utf-16"), "UTF-16"),
    ],
)
def test_foreign_bytes_in_a_tokenizers_files_are_named_by_their_kind(
    tmp_path: Path, name: str, content: bytes, kind: str
) -> None:
    (saved(qwen(), tmp_path) / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name}.*{kind}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("make", [llama2, mistral, gemma])
def test_a_beginning_in_the_template_and_one_of_the_tokenizer_are_one(make: Any) -> None:
    tokenizer = make()
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id, "a beginning of its own"
    chat, plain = PromptContract.derive(tokenizer), PromptContract.derive(tokenizer, form=PLAIN)
    for contract in (chat, plain):
        ids = contract.av_prompt_ids(tokenizer)
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


# Chat templates


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% for m in messages %}{{ m['content'] }}", r"fails on messages of user: TemplateSyntaxError.*line 1"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 3 }}", "fails on messages of user: TypeError"),
        ("{{ messages[7]['content'] }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ({"rag": CHATML, "tool_use": CHATML}, "are rag, tool_use: none of them is named default"),
        (None, "no chat template"),
    ],
)
def test_whatever_fails_in_a_template_is_a_named_error(template: Any, told: str) -> None:
    tokenizer = qwen(chat=None)
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=told) as caught:
        PromptContract.derive(tokenizer)
    assert "templates." in caught.value.remedy or "chat_options" in caught.value.remedy


def test_one_of_several_named_templates_can_be_chosen() -> None:
    tokenizer = qwen(chat=None)
    tokenizer.chat_template = {"rag": "RAG " + CHATML, "tool_use": CHATML}
    contract = PromptContract.derive(tokenizer, form=AvPromptSpec(chat_options={"chat_template": "rag"}))
    assert str(contract.form.text).startswith("RAG <|im_start|>")
    contract.check(tokenizer)
    with pytest.raises(ConfigError, match="none is named 'other'"):
        render(tokenizer, USER, {"chat_template": "other"})
    tokenizer.chat_template = {"default": CHATML, "tool_use": "other"}
    assert render(tokenizer, USER).text == render(qwen(), USER).text


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML, "refuses a"),
        ("{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}", "leaves the system message"),
    ],
)
def test_a_system_message_that_a_template_refuses_or_drops_is_named(template: str, told: str) -> None:
    tokenizer = qwen(chat=template)
    render(tokenizer, USER)
    with pytest.raises(ConfigError, match=f"{told}[\\s\\S]*system_role=user"):
        render(tokenizer, SYSTEM)
    assert "Be brief." in render(qwen(), SYSTEM).text


# Plain text


def test_a_question_that_a_template_leaves_out_is_named() -> None:
    tokenizer = qwen()
    tokenizer.chat_template = "<!DOCTYPE html><html>404</html>"
    with pytest.raises(ConfigError, match="leaves the user message out"):
        render(tokenizer, USER)


def test_a_base_model_has_a_plain_prompt(tmp_path: Path) -> None:
    base = gpt2()
    with pytest.raises(ConfigError, match="templates.format=plain"):
        PromptContract.derive(base)
    contract = PromptContract.derive(base, AV_PLAIN_TEMPLATE, AR_TEMPLATE, form=PLAIN)
    assert base.decode(contract.av_prompt_ids(base)) == AV_PLAIN_TEMPLATE.replace(INJECT, contract.marker)
    assert contract.av_response_ids(base, "a")[-1] == base.eos_token_id
    assert kept(contract, tmp_path) == contract and kept(contract, tmp_path).form == contract.form


def test_a_plain_prompt_begins_as_the_policy_says_and_never_ends() -> None:
    tokenizer = llama2()
    begun = PromptContract.derive(tokenizer, AV_PLAIN_TEMPLATE, form=PLAIN)
    bare = PromptContract.derive(tokenizer, AV_PLAIN_TEMPLATE, bos_policy="none", form=PLAIN)
    assert begun.av_prompt_ids(tokenizer) == [tokenizer.bos_token_id, *bare.av_prompt_ids(tokenizer)]


def test_a_plain_prompt_repeats_its_marker_for_each_activation() -> None:
    tokenizer = smollm()
    contract = PromptContract.derive(tokenizer, AV_PLAIN_TEMPLATE, repeats=(1, 4), form=PLAIN)
    for count in (1, 4):
        ids = contract.av_prompt_ids(tokenizer, activations=count)
        assert len(contract.marker_positions(ids, activations=count)) == count


# Days


def kept(contract: PromptContract, folder: Path, **rest: Any) -> PromptContract:
    """The contract as it comes back from a sidecar."""
    from nla_megatron.contract.blocks import CorpusSlice, DatasetExtraction

    extraction = DatasetExtraction("base", 4, 1, "corpus", CorpusSlice(0, 1), 1)
    sidecar = DatasetSidecar.from_contract(contract, stage="rl", row_count=1, extraction=extraction, **rest)
    write_dataset_sidecar(folder / "rl.parquet", sidecar)
    return prompt_contract(read_dataset_sidecar(folder / "rl.parquet"))


def test_a_prompt_with_a_date_stays_that_of_the_day_it_was_built(tmp_path: Path) -> None:
    tokenizer = qwen(chat=DATED)
    contract = PromptContract.derive(tokenizer, form=AvPromptSpec(date="2024-07-26"))
    assert contract.form.date == "2024-07-26" and "Today Date: 26 Jul 2024" in str(contract.form.text)
    later = kept(contract, tmp_path)
    later.check(tokenizer)
    assert later.av_prompt_ids(tokenizer) == contract.av_prompt_ids(tokenizer)
    assert "26 Jul 2024" in tokenizer.decode(later.av_prompt_ids(tokenizer))
    today = PromptContract.derive(tokenizer)
    assert today.form.date == date.today().isoformat() and not today.form.same_prompt(contract.form)
    told = AvPromptSpec(chat_options={"day": "a day"}, date="2024-07-26")
    assert PromptContract.derive(tokenizer, form=told).form.date is None, "the template was told and read no clock"


def test_a_file_without_the_prompt_has_that_of_the_day_it_was_made(tmp_path: Path) -> None:
    """Also where a run on it goes on another day."""
    tokenizer = qwen(chat=DATED)
    old = PromptContract(**{**vars(PromptContract.derive(tokenizer)), "form": AvPromptSpec()})
    read = kept(old, tmp_path, created_at="2025-03-01T10:00:00+00:00")
    assert read.form.text is None and "01 Mar 2025" in tokenizer.decode(read.av_prompt_ids(tokenizer))
    assert "01 Mar 2025" in str(read.fixed(tokenizer).form.text)


def test_a_chat_template_that_is_another_than_the_recorded_prompts_is_named() -> None:
    contract = PromptContract.derive(qwen())
    other = CHATML.replace("{% for", "You are an assistant.\n{% for", 1)
    with pytest.raises(SidecarError, match="records the AV prompt[\\s\\S]*You are an assistant"):
        contract.check(qwen(chat=other))


def test_a_prompt_without_a_date_is_the_same_file_on_every_day() -> None:
    assert (
        PromptContract.derive(qwen()).form == PromptContract.derive(qwen(), form=AvPromptSpec(date="2001-01-01")).form
    )


# Readers of one file that differ


def test_a_tokenizer_that_transformers_makes_anew_is_noticed_with_the_way_to_read_it(tmp_path: Path) -> None:
    """transformers 5 builds the tokenizers of many classes from their vocabulary and the class's own rules. Here the
    file's rules keep the marker apart, and Qwen's hand it to its neighbours, as happens to a published pair.
    """
    tokenizer = qwen()
    core = tokenizer.backend_tokenizer
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(MARKER, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    content = json.loads(core.to_str())
    vocab, (first, second) = content["model"]["vocab"], (">", content["model"]["merges"][0])
    pieces = tokenizer.convert_ids_to_tokens([PromptContract.derive(tokenizer).marker_id])
    joined = first + pieces[0]
    vocab[joined] = len(vocab)
    content["model"]["merges"].append([first, pieces[0]] if isinstance(second, list) else f"{first} {pieces[0]}")
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<|im_end|>", chat_template=CHATML
    )
    contract = PromptContract.derive(made)
    assert contract.marker == MARKER
    configured(saved(made, tmp_path, config={"model_type": "qwen2"}), tokenizer_class="Qwen2Tokenizer")
    with pytest.raises(MarkerError, match=r"transformers 5\S+ makes Qwen2Tokenizer anew[\s\S]*PreTrainedTokenizerFast"):
        contract.check(load_tokenizer(tmp_path))
    assert contract.literal(load_tokenizer(tmp_path)) is not None
    keep_as_it_stands(tmp_path)
    contract.check(load_tokenizer(tmp_path))
    assert contract.literal(load_tokenizer(tmp_path)) is None, "nothing is amiss any more"
