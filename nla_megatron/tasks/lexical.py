"""The task `lexical`: go on from the beginning of a sentence, in as many different words as possible.

Words stand between white space and are compared in lower case, as the reward `lexical_richness` counts them; richness
is the share of different ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from nla_megatron.config.options import bind
from nla_megatron.contract.splits import held_out as is_held_out
from nla_megatron.contract.tokenizer import load_tokenizer
from nla_megatron.errors import ColumnError, ConfigError
from nla_megatron.tasks.rows import Question, question_of, read_rows
from nla_megatron.tasks.text import Data, PromptStyle, TextTask, register, spread
from nla_megatron.types import Measured, Rollout

if TYPE_CHECKING:
    from torch import Tensor

    from nla_megatron.contract.tokenizer import AnyTokenizer

_OPTIONS = "task.options"
_SENTENCE = re.compile(r"(?:(?<=\s)|^)[A-Z](?!\S*[\"'()\[\]])[^.!?\n]{20,}?[.!?](?=\s|$)")


@dataclass(frozen=True)
class LexicalOptions:
    """Options of the task `lexical`.

    `prompt_column`: of a file of prompts. A corpus (`doc_id`, `text`) gives the first sentence of each document, cut to
    `prompt_words` words; without `data` they are the paragraphs of the reference of Python, which every Python has.
    `held_out_fraction`: of the prompts, by a hash of each, to evaluate on and not to train on, where the command names
    no file of held-out ones.
    """

    prompt_column: str = "prompt"
    prompt_words: int = 8
    held_out_fraction: float = 0.1
    prompt: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.prompt_words < 1:
            raise ConfigError(f"prompt_words={self.prompt_words}", "1 or more", "raise it")
        if not 0 <= self.held_out_fraction < 1:
            raise ConfigError(f"held_out_fraction={self.held_out_fraction}", "0 to below 1", "set it to, say, 0.1")


@dataclass(frozen=True)
class Prompt:
    """What is asked, and where its row can be found again."""

    question: Question
    place: Mapping[str, Any] = field(default_factory=dict)


@register("lexical")
class LexicalTask(TextTask):
    """Prompts of a file, or beginnings of a corpus' first sentences.

    Measured: `texts` are the responses, None for blank ones; `values` are `words` and `unique_words`.
    """

    measures = ("words", "unique_words")

    def __init__(self, tokenizer: AnyTokenizer, options: LexicalOptions, prompts: Sequence[Prompt | str]):
        super().__init__(tokenizer, bind(PromptStyle, options.prompt, f"{_OPTIONS}.prompt"))
        self._asked = tuple(Prompt(Question(each)) if isinstance(each, str) else each for each in prompts)
        self.prompts = tuple(each.question.text for each in self._asked)
        if spoken := next((prompt for prompt in self._asked if prompt.question.before), None):
            # A model that cannot take a conversation is named before the first step.
            self.style.ids(tokenizer, spoken.question.text, spoken.question.before)

    @classmethod
    def open(cls, options: Mapping[str, Any], data: Data, model: str, seed: int) -> LexicalTask | None:
        bound = bind(LexicalOptions, options, _OPTIONS)
        prompts = _prompts_of(bound, data)
        return cls(load_tokenizer(model), bound, prompts) if prompts else None

    @property
    def rows(self) -> int:
        return len(self.prompts)

    def text(self, row: int) -> str:
        return self.prompts[row]

    def before(self, row: int) -> Sequence[tuple[str, str]]:
        return self._asked[row].question.before

    def place(self, row: int) -> Mapping[str, Any]:
        return self._asked[row].place

    def measure(self, rollouts: Sequence[Rollout]) -> Measured:
        texts = [self.response_text(rollout).strip() for rollout in rollouts]
        counted = [words(text) for text in texts]
        return Measured(
            rollouts=tuple(rollouts),
            texts=tuple(text or None for text in texts),
            values={
                "words": torch.tensor([float(len(each)) for each in counted]),
                "unique_words": torch.tensor([float(len(set(each))) for each in counted]),
            },
        )

    def figures(self, measured: Measured) -> dict[str, Any]:
        """`richness` (mean over responses; one without words has 0), words and tokens of a response, `truncated`."""
        name, richness = self.main(measured)
        return {
            name: float(richness.mean()),
            **spread(measured.values["words"].tolist(), "words"),
            **spread([len(each.response_ids) for each in measured.rollouts], "response_tokens"),
            "truncated": sum(not each.finished for each in measured.rollouts) / len(measured.rollouts),
        }

    def main(self, measured: Measured) -> tuple[str, Tensor]:
        return "richness", measured.values["unique_words"] / measured.values["words"].clamp_min(1)

    def example(self, measured: Measured, index: int) -> dict[str, Any]:
        rollout = measured.rollouts[index]
        return {
            "row": rollout.row,
            **self.place(rollout.row),
            "prompt": self.text(rollout.row),
            "response": self.response_text(rollout),
            "finished": rollout.finished,
            **{name: float(values[index]) for name, values in measured.values.items()},
        }


def _prompts_of(options: LexicalOptions, data: Data) -> list[Prompt]:
    """The prompts of one part: of the held-out file, or a share of the others by a hash of each prompt."""
    if not data.training and data.held_out:
        return _read_prompts(data.held_out, options, "held_out")
    if data.data:
        prompts = _read_prompts(data.data, options, "data")
    else:
        prompts = _beginnings(((text, {}) for text in _paragraphs()), options)
    if data.held_out:
        return prompts
    fraction = options.held_out_fraction
    chosen = [one for one in prompts if is_held_out(one.question.text, fraction) != data.training]
    if data.training and not chosen:
        raise ColumnError(
            f"none of {len(prompts)} prompts to train on", "one or more",
            f"lower {_OPTIONS}.held_out_fraction, or add prompts",
        )  # fmt: skip
    return chosen


def _read_prompts(path: str, options: LexicalOptions, key: str) -> list[Prompt]:
    """The prompts of a file: its own column, or the beginnings of a corpus' documents.

    Raises:
        MissingFile, ColumnError.
    """
    name = options.prompt_column
    try:
        rows = read_rows(path, [name], key)
    except ColumnError as error:
        try:
            rows = read_rows(path, ["text"], key)
        except ColumnError:
            raise error from None
        prompts = _beginnings(((row.text("text"), row.place) for row in rows), options)
    else:
        prompts = [Prompt(question_of(row, name), row.place) for row in rows]
    if not prompts:
        raise ColumnError(f"no prompts in {path}", "a text in every row", "correct the file")
    return prompts


def _paragraphs() -> list[str]:
    """Of the reference of the Python language, in a stable order."""
    import pydoc_data.topics

    return [part for _, text in sorted(pydoc_data.topics.topics.items()) for part in text.split("\n\n")]


def _beginnings(texts: Iterable[tuple[str, Mapping[str, Any]]], options: LexicalOptions) -> list[Prompt]:
    """The first words of each text's first sentence, each once, in the texts' order."""
    found: dict[str, Prompt] = {}
    for text, place in texts:
        sentence = _SENTENCE.search(text)
        if sentence is not None and " " in sentence[0]:
            beginning = " ".join(sentence[0].split()[: options.prompt_words])
            found.setdefault(beginning, Prompt(Question(beginning), place))
    return list(found.values())


def words(text: str) -> list[str]:
    """The words of a text in lower case, in order.

    Example:
        >>> words("The cat saw the CAT.")
        ['the', 'cat', 'saw', 'the', 'cat.']
    """
    return text.lower().split()
