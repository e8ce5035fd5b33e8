"""Prompts of plain language models, their sequences, and the registry of tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

from nla_megatron.config.schema import TaskConfig
from nla_megatron.errors import ConfigError
from nla_megatron.models.batching import next_token_targets
from nla_megatron.tasks.lexical import LexicalOptions, LexicalTask
from nla_megatron.tasks.text import Data, PromptStyle, evaluation_rows, open_task, register, text_tasks
from nla_megatron.types import Rollout

QUESTION = "What is the `with` statement?"


def load(directory: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(directory)


@pytest.fixture
def tokenizer(model_dir: Path) -> Any:
    return load(model_dir)


@pytest.fixture
def beginning(model_dir: Path) -> Any:
    """One that begins every text with a BOS and whose template writes it too, as Llama's and Gemma's do."""
    from tokenizers.processors import TemplateProcessing

    loaded = load(model_dir)
    begin = loaded.convert_ids_to_tokens(1)
    loaded.bos_token = begin
    loaded.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, loaded.bos_token_id)]
    )
    loaded.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% if thinking %} <think>{% endif %}{% endif %}"
    )
    return loaded


def reference(tokenizer: Any, messages: Sequence[Mapping[str, str]], **options: Any) -> tuple[int, ...]:
    return tuple(
        tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=False, **options
        )
    )  # fmt: skip


def test_a_chat_prompt_is_what_transformers_makes_of_it(tokenizer: Any, beginning: Any) -> None:
    user = {"role": "user", "content": f"Q: {QUESTION}\nA {{literal}} brace."}
    system = {"role": "system", "content": "Be brief."}
    style = PromptStyle(template="Q: {prompt}\nA {literal} brace.", system="Be brief.")
    for each in (tokenizer, beginning):
        assert style.ids(each, QUESTION) == reference(each, [system, user])
        assert PromptStyle(template=style.template).ids(each, QUESTION) == reference(each, [user])
    thinking = PromptStyle(chat_options={"thinking": True}).ids(beginning, QUESTION)
    assert thinking == reference(beginning, [{"role": "user", "content": QUESTION}], thinking=True)
    assert beginning.decode(list(thinking)).endswith("assistant: <think>")


def test_no_prompt_begins_twice(beginning: Any) -> None:
    bos = beginning.bos_token_id
    for style in (PromptStyle(), PromptStyle(chat=False), PromptStyle(chat=False, plain="<|end|>{prompt}")):
        ids = style.ids(beginning, QUESTION)
        assert ids[0] == bos and ids[1] != bos
    assert beginning.bos_token == "<|end|>", "the plain text above writes the beginning out itself"
    once = PromptStyle().ids(beginning, QUESTION)
    beginning.chat_template = "{{ bos_token }}" + beginning.chat_template
    assert PromptStyle().ids(beginning, QUESTION) == once, "a template that writes it twice"


def test_a_plain_prompt_is_the_tokenizers_own_and_never_ends(model_dir: Path, tokenizer: Any, beginning: Any) -> None:
    style = PromptStyle(chat=False, plain="Q: {prompt} A:")
    assert style.ids(tokenizer, QUESTION) == tuple(tokenizer(f"Q: {QUESTION} A:")["input_ids"])
    assert style.ids(beginning, QUESTION) == tuple(beginning(f"Q: {QUESTION} A:")["input_ids"])
    from tokenizers.processors import TemplateProcessing

    ending = load(model_dir)
    ending.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|end|>", special_tokens=[("<|end|>", ending.eos_token_id)]
    )
    assert ending("a")["input_ids"][-1] == ending.eos_token_id
    assert style.ids(ending, QUESTION) == tuple(tokenizer(f"Q: {QUESTION} A:")["input_ids"])


NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


def test_a_system_message_goes_where_the_template_takes_it(tokenizer: Any) -> None:
    brief = PromptStyle(system="Be brief.")
    tokenizer.chat_template = NO_SYSTEM + tokenizer.chat_template
    with pytest.raises(ConfigError, match="refuses a system message: TemplateError: System role not supported"):
        brief.ids(tokenizer, QUESTION)
    assert PromptStyle().ids(tokenizer, QUESTION) == reference(tokenizer, [{"role": "user", "content": QUESTION}])
    merged = PromptStyle(system="Be brief.", system_role="user").ids(tokenizer, QUESTION)
    assert merged == reference(tokenizer, [{"role": "user", "content": f"Be brief.\n\n{QUESTION}"}])
    with pytest.raises(ConfigError, match="system_role='developer'"):
        PromptStyle(system_role="developer")


def test_a_template_that_writes_the_day_is_told_one_that_stays(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ strftime_now('%d %B %Y') }}" + tokenizer.chat_template
    with pytest.raises(ConfigError, match=f"set task.options.prompt.date={date.today().isoformat()}"):
        PromptStyle().ids(tokenizer, QUESTION)
    assert tokenizer.decode(PromptStyle(date="2024-07-26").ids(tokenizer, QUESTION)).startswith("26 July 2024")
    with pytest.raises(ConfigError, match="date='yesterday'"):
        PromptStyle(date="yesterday")


def test_a_model_without_a_chat_template_gets_the_plain_prompt(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    assert PromptStyle(plain="Q: {prompt}").ids(tokenizer, "a b") == tuple(tokenizer("Q: a b")["input_ids"])
    with pytest.raises(ConfigError, match="chat=false"):
        PromptStyle(chat=True).ids(tokenizer, QUESTION)


def test_a_prefill_is_the_end_of_the_prompt(tokenizer: Any) -> None:
    for style in (PromptStyle(prefill="<think>\n"), PromptStyle(chat=False, prefill="<think>\n")):
        assert tokenizer.decode(list(style.ids(tokenizer, QUESTION))).endswith("<think>\n")


@pytest.mark.parametrize("template", ["", "no place", "{prompt} and {prompt}"])
def test_a_template_holds_the_prompt_once(template: str) -> None:
    for key in ("template", "plain"):
        with pytest.raises(ConfigError, match=key):
            PromptStyle(**{key: template})


@pytest.fixture
def task(model_dir: Path) -> LexicalTask:
    found = open_task(TaskConfig("lexical"), Data(), str(model_dir), 0)
    assert isinstance(found, LexicalTask)
    return found


def test_requests_have_no_position_and_seeds_of_their_own(task: LexicalTask) -> None:
    asked = task.requests([4, 2, 4], 1, 5)
    assert [(each.group, each.row, each.position) for each in asked] == [(0, 4, None), (1, 2, None), (2, 4, None)]
    assert len({each.seed for each in asked}) == 3
    assert [each.seed for each in asked] == [each.seed for each in task.requests([4, 2, 4], 1, 5)]
    for other in (task.requests([4, 2, 4], 2, 5), task.requests([4, 2, 4], 1, 6)):
        assert not {each.seed for each in asked} & {each.seed for each in other}


def test_the_loss_takes_every_response_token_its_end_token_too(task: LexicalTask) -> None:
    """Also where the end token is the padding token, as base models have it."""
    fast = task.tokenizer.fast
    fast.pad_token, end = fast.eos_token, fast.eos_token_id
    rollouts = [
        Rollout(0, 0, 0, (5, 6, 7), (8, 9, end), (0.0,) * 3, "", True),
        Rollout(1, 0, 1, (5, 6), (end,), (0.0,), "", True),
    ]
    batch = task.batch(rollouts, {"advantages": torch.ones(2, 6)})
    assert [list(row) for row in batch.ids] == [[5, 6, 7, 8, 9, end], [5, 6, end]]
    padded = torch.tensor([[5, 6, 7, 8, 9, end], [5, 6, end, 0, 0, 0]])
    targets, mask = next_token_targets(padded), batch.fields["mask"].bool()
    assert [targets[row][mask[row]].tolist() for row in range(2)] == [[8, 9, end], [end]]
    assert batch.injection([0, 1], None) is None, "nothing intervenes"
    assert batch.fields["advantages"].shape == (2, 6)


def test_tasks_are_found_by_name_and_registered_once() -> None:
    assert {"lexical", "math"} <= set(text_tasks())
    with pytest.raises(ConfigError, match="second task 'lexical'"):
        register("lexical")(LexicalTask)
    with pytest.raises(ConfigError, match="'poetry'"):
        open_task(TaskConfig("poetry"), Data(), "anywhere", 0)


def test_a_tokenizer_without_an_end_is_refused(tokenizer: Any) -> None:
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="end token"):
        LexicalTask(tokenizer, LexicalOptions(), ["a"])


def test_evaluations_are_on_the_same_rows_each_time_and_fewer_are_the_first_of_more() -> None:
    rows = evaluation_rows(100, 10, 3)
    assert rows == evaluation_rows(100, 10, 3) and len(set(rows)) == 10 and max(rows) < 100
    assert rows != evaluation_rows(100, 10, 4) and rows == evaluation_rows(100, 40, 3)[:10]
    assert sorted(evaluation_rows(5, 10, 3)) == list(range(5))
