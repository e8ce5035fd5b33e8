"""The injection marker: the token of the AV's prompt at which the activation enters, and what stands beside it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from nla_megatron.contract.tokens import encode, name_of, single_id, templated_ids
from nla_megatron.errors import ConfigError, MarkerError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerFast

INJECT = "<INJECT>"  # stands for the marker in tables and templates, which then fit every tokenizer
_WORD = re.compile(rf"(\S*){INJECT}(\S*)")
_MARKERS = range(0x3200, 0x3400)  # enclosed CJK letters and squared words: one character each, almost absent from text


def choose_marker(tokenizer: PreTrainedTokenizerFast, av_template: str) -> str:
    """The first character of U+3200..U+33FF that is one known token, decodes to itself, and is in the prompt
    where the template has it and nowhere else.

    Raises:
        MarkerError: this tokenizer has no such character.
        ConfigError: the template lacks `<INJECT>`, or the tokenizer lacks a chat template.
    """
    check_av_template(av_template, None)
    count = av_template.count(INJECT)
    for code_point in _MARKERS:
        marker = chr(code_point)
        marker_id = single_id(tokenizer, marker)
        if marker_id is not None and prompt_ids(tokenizer, messages_of(av_template), marker).count(marker_id) == count:
            return marker
    raise MarkerError(
        f"no character of U+3200..U+33FF is a single token of tokenizer {name_of(tokenizer)!r}",
        "one character that encodes to exactly one id and decodes to itself",
        "name a rare single-token character as the marker, or add one to the tokenizer",
    )


def several_markers(av_template: str, count: int) -> str:
    """A template with one marker between its tags, as one with `count` of them, each on a line of its own."""
    tagged = f"<concept>{INJECT}</concept>"
    return av_template.replace(tagged, "\n".join([tagged] * count))


def repeated(av_template: str, count: int) -> str:
    """A template with one marker as one with `count`: the word that holds it, so often, each on a line of its own.

    Raises:
        ConfigError: other than one marker, or a word that has no text on either side of it, so that what stands beside
            a marker would depend on how many there are.
    """
    check_av_template(av_template)
    [(before, after)] = _WORD.findall(av_template)
    if not (before and after):
        raise ConfigError(
            f"the AV template holds {INJECT} in the word {before + INJECT + after!r}, which cannot be repeated for "
            "each of a row's activations", "text on both sides of it, without a space between",
            f"write <concept>{INJECT}</concept> where the activations go",
        )  # fmt: skip
    return _WORD.sub(lambda found: "\n".join([found[0]] * count), av_template)


def marker_neighbours(
    tokenizer: PreTrainedTokenizerFast, av_template: str, marker: str, count: int = 1
) -> tuple[int, int]:
    """The token ids just before and after the marker in the chat-templated AV prompt, each of `count` times.

    Raises:
        MarkerError: the marker is not exactly one token, not exactly `count` times in the prompt, at its edge, or
            between other neighbours at one place than at another.
    """
    marker_id = single_id(tokenizer, marker)
    if marker_id is None:
        raise MarkerError(
            f"marker {marker!r} encodes to {encode(tokenizer, marker)} with tokenizer {name_of(tokenizer)!r}",
            "exactly one id, not the unknown token, that decodes to the marker",
            "use the tokenizer the sidecar was written for, or build the data again with this one",
        )
    ids = prompt_ids(tokenizer, messages_of(av_template), marker)
    positions = [at for at, one in enumerate(ids) if one == marker_id]
    if len(positions) != count:
        raise MarkerError(
            f"marker {marker!r} (id {marker_id}) is {len(positions)} times in the AV prompt",
            times(count),
            "check the AV template and the tokenizer's chat template",
        )
    if not 0 < positions[0] <= positions[-1] < len(ids) - 1:
        raise MarkerError(
            f"marker {marker!r} stands at position {positions[0]} of {len(ids)} in the AV prompt",
            "a token on either side of it",
            "put text around <INJECT> in the AV template",
        )
    beside = {(ids[at - 1], ids[at + 1]) for at in positions}
    if len(beside) > 1:
        raise MarkerError(
            f"marker {marker!r} stands between the ids {sorted(beside)} in the AV prompt",
            "the same neighbours everywhere",
            "put the same text around every <INJECT> in the AV template",
        )
    return beside.pop()


def messages_of(av_template: str) -> list[dict[str, str]]:
    """The AV prompt as tables store it: one user message with the literal `<INJECT>`."""
    return [{"role": "user", "content": av_template}]


def prompt_ids(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Mapping[str, str]], marker: str) -> list[int]:
    """Token ids of messages in which `<INJECT>` stands for the marker."""
    return templated_ids(tokenizer, [{**turn, "content": turn["content"].replace(INJECT, marker)} for turn in messages])


def times(count: int) -> str:
    """For messages."""
    return "exactly once" if count == 1 else f"exactly {count} times"


def check_av_template(template: str, count: int | None = 1) -> None:
    """Raises ConfigError where a template has other than `count` markers; None is any number but none."""
    found = template.count(INJECT)
    if found == 0 or (count is not None and found != count):
        raise ConfigError(
            f"the AV template holds {INJECT} {found} times",
            times(count or 1),
            f"write <concept>{INJECT}</concept> where the activation goes",
        )
