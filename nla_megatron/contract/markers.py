"""The injection marker: the token of the AV's prompt at which the activation enters, and what stands beside it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nla_megatron.contract.tokenizer import ModelTokenizer, wrapped
from nla_megatron.errors import ConfigError, MarkerError

if TYPE_CHECKING:
    from nla_megatron.contract.tokenizer import AnyTokenizer

INJECT = "<INJECT>"  # stands for the marker in tables and templates, which then fit every tokenizer
_WORD = re.compile(rf"(\S*){INJECT}(\S*)")
_FIRST = range(0x3200, 0x3400)  # enclosed CJK letters and squared words: one character each, almost absent from text
_RESERVED = re.compile(r"unused|reserved|dummy|spare|placeholder|extra_?id|control_|special_?\d", re.IGNORECASE)
_UNREADABLE = "\ufffd"  # what a part of a character decodes to
_SYMBOLS, _LETTERS = {"So", "Sm", "Sk", "No", "Nl"}, {"Lo"}


@dataclass(frozen=True)
class Prompt:
    """A text with `<INJECT>` in it that has become token ids, and what stands where the marker is.

    `found`: for each place, the numbers of the tokens that the marker's characters went into; a sound one is a single
    token, of these characters alone.
    """

    ids: list[int]
    found: list[list[int]]
    sound: bool

    @property
    def positions(self) -> list[int]:
        """Of the first token of each place."""
        return [tokens[0] for tokens in self.found]


def placed(tokenizer: ModelTokenizer, text: str, marker: str, special: bool = False) -> Prompt:
    """Put the marker where the text has `<INJECT>`.

    A token is the marker's only where it begins and ends with it and means nothing else: tokenizers also have tokens of
    a marker together with a space or a bracket beside it.
    """
    whole = marker.join(parts := text.split(INJECT))
    encoded = tokenizer.beginning(whole, special)
    start, found, sound = 0, [], True
    for part in parts[:-1]:
        start += len(part)
        stop = start + len(marker)
        tokens = [at for at, (low, high) in enumerate(encoded.offsets) if low < stop and high > start]
        found.append(tokens)
        sound = sound and len(tokens) == 1 and encoded.offsets[tokens[0]] == (start, stop)
        start = stop
    ids = {encoded.ids[tokens[0]] for tokens in found if tokens}
    sound = sound and len(ids) == 1 and _means(tokenizer, ids, marker)
    return Prompt(encoded.ids, found, sound)


def _means(tokenizer: ModelTokenizer, ids: set[int], marker: str) -> bool:
    return tokenizer.fast.unk_token_id not in ids and tokenizer.decode(list(ids)) == marker


def choose_marker(tokenizer: AnyTokenizer, text: str, special: bool = False) -> str:
    """The first marker of `candidates` that is one known token, means itself, and is in the prompt where the text has
    `<INJECT>` and nowhere else.

    Args:
        text: the AV's prompt as the tokenizer reads it, its chat template and all.

    Raises:
        MarkerError: this tokenizer has none.
    """
    tokenizer = wrapped(tokenizer)
    for marker in candidates(tokenizer):
        if marker in text:
            continue
        prompt = placed(tokenizer, text, marker, special)
        if prompt.sound and prompt.ids.count(prompt.ids[prompt.positions[0]]) == len(prompt.found):
            return marker
    raise MarkerError(
        f"no character of U+3200..U+33FF, no other rare one and no reserved token is a single token of tokenizer "
        f"{tokenizer.name!r} in the AV prompt",
        "a character or a special token that encodes to exactly one id and decodes to itself",
        "name a marker with templates.marker, or add one to the tokenizer",
    )


def candidates(tokenizer: ModelTokenizer) -> Iterator[str]:
    """What can be a marker, the best first: characters of U+3200..U+33FF, which other trainers use; other symbols that
    the tokenizer has as tokens, the last and so the rarest first; its reserved tokens; letters without case; control
    characters, which tokenizers of bytes have all.
    """
    yield from map(chr, _FIRST)
    vocabulary = tokenizer.fast.get_vocab()
    short = sorted((number for token, number in vocabulary.items() if len(token) <= 6), reverse=True)
    single = [
        text for text in (tokenizer.decode([number]) for number in short) if len(text) == 1 and text != _UNREADABLE
    ]
    yield from (text for text in single if not text.isascii() and unicodedata.category(text) in _SYMBOLS)
    taken = {tokenizer.decode([number]) for number in (*tokenizer.fast.all_special_ids, *tokenizer.end_ids)}
    for token in sorted(vocabulary, key=lambda each: vocabulary[each]):
        if _RESERVED.search(token) and token not in taken:
            yield token
    yield from (text for text in single if unicodedata.category(text) in _LETTERS and text.isprintable())
    yield from (text for text in single if unicodedata.category(text) == "Cc" and not text.isspace() and text != "\0")


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
    tokenizer: AnyTokenizer, text: str, marker: str, count: int = 1, special: bool = False
) -> tuple[int, int, int]:
    """The ids of the marker and of the tokens just before and after it in the AV's prompt, each of `count` times.

    Args:
        text: the AV's prompt as the tokenizer reads it, its chat template and all, with `<INJECT>`.

    Raises:
        MarkerError: the marker is not exactly one token, not exactly `count` times in the prompt, at its edge, or
            between other neighbours at one place than at another.
    """
    tokenizer = wrapped(tokenizer)
    prompt = placed(tokenizer, text, marker, special)
    if prompt.found and not prompt.sound:
        ids = [prompt.ids[at] for at in prompt.found[0]]
        raise MarkerError(
            f"marker {marker!r} encodes to {ids} in the AV prompt with tokenizer {tokenizer.name!r}",
            "exactly one id, not the unknown token, that decodes to the marker",
            "use the tokenizer the sidecar was written for, or build the data again with this one",
        )
    marker_id = prompt.ids[prompt.positions[0]] if prompt.found else None
    times_there = 0 if marker_id is None else prompt.ids.count(marker_id)
    if times_there != count:
        raise MarkerError(
            f"marker {marker!r} (id {marker_id}) is {times_there} times in the AV prompt",
            times(count),
            "check the AV template and the tokenizer's chat template",
        )
    ids, positions = prompt.ids, prompt.positions
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
    assert marker_id is not None
    return (marker_id, *beside.pop())


def repeated_within(text: str, av_template: str, count: int) -> str:
    """A prompt that holds a template with one marker, as it is where the template has `count` of them (`repeated`).

    Raises:
        ConfigError: as `repeated`, or a chat template that changed the text of the message.
    """
    for message in (av_template, av_template.strip()):
        if text.count(message) == 1:
            return text.replace(message, repeated(message, count))
    raise ConfigError(
        "a chat template that changes the text of a message, or has it more than once",
        "one that has it as it is, in which the marker can be repeated for each of a row's activations",
        "set templates.format=plain, or rows with a fixed number of activations (no pool_least)",
    )


def messages_of(av_template: str) -> list[dict[str, str]]:
    """The AV prompt as tables store it: one user message with the literal `<INJECT>`."""
    return [{"role": "user", "content": av_template}]


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
