"""Tasks whose policy is a plain language model: prompts are text, and so is what is measured.

A task is a class with `@register(name)`; the command `rl` and the command `eval` find it by that name.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from nla_megatron.config.registry import Registry
from nla_megatron.config.schema import TaskConfig
from nla_megatron.contract.chat import parse_day
from nla_megatron.contract.tokenizer import wrapped
from nla_megatron.errors import ConfigError, LayoutError
from nla_megatron.models.batching import Batch, response_mask
from nla_megatron.rollout.requests import PromptRequest
from nla_megatron.tasks.lengths import longest_row
from nla_megatron.types import Measured, Rollout

if TYPE_CHECKING:
    from torch import Tensor

    from nla_megatron.contract.tokenizer import AnyTokenizer

PROMPT = "{prompt}"
_ANY_DAY = "2000-01-01"  # for templates that do not ask
_SHUFFLE = 8  # tells the order of held-out rows from other uses of the seed


@dataclass(frozen=True)
class PromptStyle:
    """How a text becomes what the model reads.

    `chat`: with the tokenizer's chat template; None is where it has one. `system`: a system message; "" is none.
    `template`: the user's message, with `{prompt}` once. `plain`: the same for models without a chat template, the
    whole text before the response. `chat_options`: variables of the chat template, such as `enable_thinking`.
    `prefill`: what the response begins with, given to the model as part of the prompt. `system_role`: system, or user:
    the system message's text at the head of the user's, for chat templates that take no system message. `date`: the day
    (2026-01-31) that a chat template which writes one is told, today and when the run goes on.
    """

    chat: bool | None = None
    system: str = ""
    template: str = PROMPT
    plain: str = PROMPT
    chat_options: dict[str, Any] = field(default_factory=dict)
    prefill: str = ""
    system_role: str = "system"
    date: str = ""

    def __post_init__(self) -> None:
        for key in ("template", "plain"):
            if getattr(self, key).count(PROMPT) != 1:
                raise ConfigError(
                    f"{key}={getattr(self, key)!r}", f"a text with {PROMPT} once",
                    f"write {PROMPT} where the prompt goes",
                )  # fmt: skip
        if self.system_role not in ("system", "user"):
            raise ConfigError(f"system_role={self.system_role!r}", "system or user", "set system_role to one of them")
        if self.date:
            parse_day(self.date, "date")

    def chats(self, tokenizer: AnyTokenizer) -> bool:
        """Whether prompts are framed by the tokenizer's chat template."""
        return wrapped(tokenizer).has_chat if self.chat is None else self.chat

    def ids(self, tokenizer: AnyTokenizer, text: str, before: Sequence[tuple[str, str]] = ()) -> tuple[int, ...]:
        """The prompt's token ids. Special tokens are the chat template's, or the tokenizer's own where there is none;
        a beginning is never written twice, and an end never.

        Args:
            before: (role, content) of what was said before `text`; a system message in it stands in place of `system`.

        Raises:
            ConfigError: a chat template that is not there or fails, or that writes the day and is told none; something
                said before without one.
        """
        tokenizer = wrapped(tokenizer)
        if not self.chats(tokenizer):
            if before:
                raise ConfigError(
                    f"a prompt of {len(before) + 1} messages for {tokenizer.name}, which is given plain text",
                    "a chat template, or prompts of one message", "use a model with a chat template",
                )  # fmt: skip
            return tuple(tokenizer.beginning(self.plain.replace(PROMPT, text) + self.prefill, special=True).ids)
        messages = self._messages(text, before)
        rendered = tokenizer.render(messages, self.chat_options, parse_day(self.date or _ANY_DAY, "date"))
        if rendered.dated and not self.date:
            raise ConfigError(
                f"the chat template of {tokenizer.name} writes today's date, so prompts would change when a run goes "
                "on tomorrow, or is evaluated then", "a day that stays",
                f"set task.options.prompt.date={date.today().isoformat()}",
            )  # fmt: skip
        return tuple(tokenizer.beginning(rendered.text + self.prefill, special=False).ids)

    def _messages(self, text: str, before: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
        messages = [{"role": role, "content": content} for role, content in before]
        messages.append({"role": "user", "content": self.template.replace(PROMPT, text)})
        if self.system and messages[0]["role"] != "system":
            if self.system_role == "system":
                return [{"role": "system", "content": self.system}, *messages]
            first = next(message for message in messages if message["role"] == "user")
            first["content"] = f"{self.system}\n\n{first['content']}"
        return messages


@dataclass(frozen=True)
class Data:
    """What a command says of rows: its keys `data` and `held_out` ("" where not given), and which of the two parts is
    wanted. An evaluation's `data` is a `held_out` here.
    """

    data: str = ""
    held_out: str = ""
    training: bool = True


class TextTask(ABC):
    """Prompts by row, and what responses to them are worth.

    Subclasses are made by `open`, which raises named errors for whatever is wrong with options and files.
    """

    name: ClassVar[str] = ""
    measures: ClassVar[tuple[str, ...]] = ()
    """Names of the values that `measure` gives."""

    def __init__(self, tokenizer: AnyTokenizer, style: PromptStyle):
        self.tokenizer, self.style = wrapped(tokenizer), style
        self.tokenizer.check_ends()
        self._prompt_ids: dict[int, tuple[int, ...]] = {}

    @classmethod
    @abstractmethod
    def open(cls, options: Mapping[str, Any], data: Data, model: str, seed: int) -> TextTask | None:
        """The task of a model's directory on one part of the rows; None where held-out ones are wanted and there are
        none.
        """

    @property
    @abstractmethod
    def rows(self) -> int:
        """How many prompts there are."""

    @abstractmethod
    def text(self, row: int) -> str:
        """The text of a row that the prompt is made of."""

    def before(self, row: int) -> Sequence[tuple[str, str]]:
        """(role, content) of what was said before a row's text."""
        return ()

    def place(self, row: int) -> Mapping[str, Any]:
        """Where a row can be found again, for records: its file, and its line or row there, as far as it has one."""
        return {}

    @abstractmethod
    def measure(self, rollouts: Sequence[Rollout]) -> Measured:
        """What each response is, in the rollouts' order."""

    @abstractmethod
    def figures(self, measured: Measured) -> dict[str, Any]:
        """What an evaluation reports: numbers, and tables of them."""

    @abstractmethod
    def main(self, measured: Measured) -> tuple[str, Tensor]:
        """The figure that stands for the task, by its name in `figures`, and its value for each response (N,)."""

    @abstractmethod
    def example(self, measured: Measured, index: int) -> dict[str, Any]:
        """One response with its prompt and everything measured of it, as JSON has it."""

    def chosen(self, rows: Sequence[int], step: int, at: int) -> list[int]:
        """The rows that a step asks for in place of those drawn; the same ones unless there is a curriculum.

        `at` is where the curriculum stands; `step` also tells several draws of one step apart.
        """
        return list(rows)

    def prompt_ids(self, row: int) -> tuple[int, ...]:
        """Token ids of a row's prompt."""
        if row not in self._prompt_ids:
            self._prompt_ids[row] = self.style.ids(self.tokenizer, self.text(row), self.before(row))
        return self._prompt_ids[row]

    def requests(self, rows: Sequence[int], seed: int, step: int, at: int | None = None) -> list[PromptRequest]:
        """One prompt per row, no vector in any; sampling seeds depend on (seed, step, place, row) alone.

        Args:
            at: where a curriculum stands, if that is not `step`.
        """
        return [
            PromptRequest(group, row, self.prompt_ids(row), None, _sampling_seed(seed, step, group, row))
            for group, row in enumerate(self.chosen(rows, step, step if at is None else at))
        ]

    def batch(self, rollouts: Sequence[Rollout], fields: Mapping[str, Tensor]) -> Batch:
        """Prompt and response of each rollout. The mask takes every token of the response, its end token too."""
        ids = [[*rollout.prompt_ids, *rollout.response_ids] for rollout in rollouts]
        lengths = [len(row) for row in ids]
        mask = response_mask([len(rollout.prompt_ids) for rollout in rollouts], lengths, max(lengths))
        return Batch(ids=ids, fields={"mask": mask, **fields})

    def response_text(self, rollout: Rollout) -> str:
        """A response without the special token that ended it, whichever of the model's that was."""
        ids = rollout.response_ids
        if ids and ids[-1] in self.tokenizer.special_ids:
            return self.tokenizer.decode(ids[:-1])
        return rollout.text

    def check_length(self, max_new_tokens: int, limit: int) -> int:
        """The longest prompt in tokens, which leaves room for its response.

        Of very many not all are counted (`longest_row`); the sampler looks at every prompt once more.

        Raises:
            LayoutError: a prompt that does not.
        """
        row, longest = longest_row(
            self.rows,
            lambda row: " ".join([*(content for _, content in self.before(row)), self.text(row)]),
            lambda row: len(self.style.ids(self.tokenizer, self.text(row), self.before(row))),
        )
        if longest + max_new_tokens > limit:
            raise LayoutError(
                f"a prompt of {longest} tokens (row {row}) and rollout.max_new_tokens={max_new_tokens}",
                f"at most {limit} tokens in all", "lower rollout.max_new_tokens or raise rollout.max_model_len",
            )  # fmt: skip
        return longest


def evaluation_rows(available: int, wanted: int, seed: int) -> list[int]:
    """Up to `wanted` rows, drawn once for all evaluations of a run; fewer are the first of more."""
    import numpy as np

    order: list[int] = np.random.default_rng([seed, _SHUFFLE]).permutation(available)[:wanted].tolist()
    return order


def no_vectors(rows: Sequence[int]) -> NoReturn:
    """The activations of rows whose prompts are text: nobody asks for them."""
    raise AssertionError("a text task has no activations")


_TASKS: Registry[type[TextTask]] = Registry("task", named=True)
register = _TASKS.register
"""Class decorator: makes a task known by name."""


def text_tasks() -> tuple[str, ...]:
    """The names of all text tasks."""
    # Registers ours; inside, because the modules import the names above.
    from nla_megatron.tasks import lexical  # noqa: F401
    from nla_megatron.tasks.math import task  # noqa: F401

    return tuple(sorted(_TASKS))


def open_task(config: TaskConfig, data: Data, model: str, seed: int) -> TextTask | None:
    """The task that a configuration names; None where `data` asks for held-out rows and there are none.

    Raises:
        ConfigError: an unknown task, an unknown option, or one of a wrong value.
        MissingFile, ColumnError: of the data or the tokenizer.
    """
    known = text_tasks()
    if config.name not in known:
        raise ConfigError(f"task {config.name!r}", f"one of {', '.join(known)}", "correct task=")
    return _TASKS[config.name].open(config.options, data, model, seed)


def _sampling_seed(seed: int, step: int, place: int, row: int) -> int:
    digest = hashlib.sha256(f"text:{seed}:{step}:{place}:{row}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def spread(values: Sequence[float], name: str) -> dict[str, float]:
    """Mean, median and 90th percentile (linear between neighbours), as `{name}_mean` and so on."""
    import numpy as np

    array = np.asarray(values, dtype=np.float64)
    return {
        f"{name}_mean": float(array.mean()),
        f"{name}_median": float(np.median(array)),
        f"{name}_p90": float(np.percentile(array, 90)),
    }
