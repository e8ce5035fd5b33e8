"""A chat in a tokenizer's template: the text that comes of it, on a day that is given, and what can fail in it.

A template is a program that came with a model. It may refuse a role, read the clock, or not be one at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from typing import TYPE_CHECKING, Any

from nla_megatron.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Rendered:
    """A chat as text; `dated` where the template wrote the day into it."""

    text: str
    dated: bool


def name_of(fast: PreTrainedTokenizerFast) -> str:
    """What messages call a tokenizer: where it was loaded from."""
    return fast.name_or_path or type(fast).__name__


def parse_day(text: str, key: str) -> date:
    """A day as a configuration gives it. Raises ConfigError."""
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"{key}={text!r}", "a day as 2026-01-31", f"correct {key}") from None


def render(
    fast: PreTrainedTokenizerFast,
    messages: Messages,
    options: Mapping[str, Any] | None = None,
    day: date | None = None,
    answer: bool = True,
) -> Rendered:
    """The text of a chat, up to where the assistant answers.

    Args:
        options: variables of the template, such as `enable_thinking`; `chat_template` names one of several templates.
        day: what a template that reads the clock is told; None is today.
        answer: False: the chat as it is, without the beginning of an answer.

    Raises:
        ConfigError: no template, none that is the default, or whatever fails in it; a system message that it refuses; a
            message that it leaves out.
    """
    options = dict(options or {})
    _check_there(fast, options)
    clock = _Clock(datetime.combine(day or date.today(), time()))
    try:
        text = _rendered(fast, messages, options, clock, answer)
    except Exception as error:  # a template is foreign code, which can raise anything
        raise _failed(fast, messages, options, answer, error) from error
    # What an assistant has said may be shortened, by its thinking.
    for message in messages:
        role = message["role"]
        if role in ("system", "user") and "".join(message["content"].split()) not in "".join(text.split()):
            raise ConfigError(
                f"the chat template of {name_of(fast)} leaves the {role} message out", "a template that writes it",
                _WITHOUT_SYSTEM if role == "system" else _MEND,
            )  # fmt: skip
    return Rendered(text, clock.read)


_MEND = (
    "mend chat_template.jinja (or chat_template in tokenizer_config.json) in the tokenizer's directory, or use "
    "plain text: templates.format=plain for `build`, task.options.prompt.chat=false for a text task"
)
_WITHOUT_SYSTEM = (
    "put the system message's text into the user's message, or give no system message "
    "(a text task: task.options.prompt.system_role=user, or task.options.prompt.system='')"
)


class _Clock:
    """What templates call `strftime_now`: the day that was given, and whether it was asked for."""

    def __init__(self, now: datetime):
        self.now, self.read = now, False

    def __call__(self, form: str) -> str:
        self.read = True
        return self.now.strftime(form)


def _rendered(
    fast: PreTrainedTokenizerFast, messages: Messages, options: Mapping[str, Any], clock: _Clock, answer: bool
) -> str:
    turns: Any = [dict(message) for message in messages]
    # A variable of the template hides the function of the same name that transformers offers to every template.
    given = {"strftime_now": clock, **options}
    return str(fast.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer, **given))


def _check_there(fast: PreTrainedTokenizerFast, options: Mapping[str, Any]) -> None:
    template, chosen = fast.chat_template, options.get("chat_template")
    if not template:
        raise ConfigError(
            f"tokenizer {name_of(fast)!r} has no chat template", "a chat template, which frames the prompt",
            "use the instruction-tuned model's tokenizer, or plain text in place of a chat: "
            "templates.format=plain for `build`, task.options.prompt.chat=false for a text task",
        )  # fmt: skip
    if isinstance(template, dict) and chosen not in template and (chosen is not None or "default" not in template):
        names = ", ".join(sorted(template))
        found = "none of them is named default" if chosen is None else f"none is named {chosen!r}"
        raise ConfigError(
            f"the chat templates of {name_of(fast)} are {names}: {found}", f"the name of one: {names}",
            f"set chat_options.chat_template={sorted(template)[0]} (in templates, or in task.options.prompt), or name "
            "one of them default in the tokenizer's tokenizer_config.json",
        )  # fmt: skip
    if chosen is not None and not isinstance(template, dict):
        raise ConfigError(
            f"chat_options.chat_template={chosen!r} for {name_of(fast)}, which has a single template", "no name",
            "leave chat_options.chat_template out",
        )  # fmt: skip


def _failed(
    fast: PreTrainedTokenizerFast, messages: Messages, options: Mapping[str, Any], answer: bool, error: Exception
) -> ConfigError:
    """What to say of a template that raised: whether it is the system message alone that it does not take."""
    line = getattr(error, "lineno", None)
    what = f"{type(error).__name__}: {error}" + ("" if line is None else f" (line {line} of the template)")
    rest = [message for message in messages if message["role"] != "system"]
    if len(rest) < len(messages):
        try:
            _rendered(fast, rest, options, _Clock(datetime.combine(date.today(), time())), answer)
        except Exception:  # then the system message is not what is wrong
            pass
        else:
            return ConfigError(
                f"the chat template of {name_of(fast)} refuses a system message: {what}",
                "a template that takes one, or no system message", _WITHOUT_SYSTEM,
            )  # fmt: skip
    roles = ", ".join(message["role"] for message in messages)
    return ConfigError(
        f"the chat template of {name_of(fast)} fails on messages of {roles}: {what}", "a template that frames them",
        _MEND,
    )  # fmt: skip
