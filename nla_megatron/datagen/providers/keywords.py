"""Explanations without a model: the last word, the words before it, and the words that set the text apart.

Deterministic and offline, for tests, demos and a first look at a pipeline. The explanation depends on the text and on
what `fit` saw, never on the other requests or their order.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from nla_megatron.config.options import check_option
from nla_megatron.contract.prompts import extract_explanation, wrap_explanation
from nla_megatron.datagen.providers import (
    MIN_FEATURES,
    BaseProvider,
    ExplainRequest,
    Explanation,
    register,
)
from nla_megatron.errors import ConfigError

# Three letters and fewer are mostly articles and prepositions.
_WORD = re.compile(r"[A-Za-z_]{4,}")
# A ruler of `=` or a pasted hash is one "word"; its start says all there is to say.
MAX_WORD_CHARS = 24
_PIECE = re.compile(r"[^\W\d_]+|\d+|(?:[^\w\s]|_)+")
PIECES_CHARS = 1000
"""Pieces are looked for in so much of a text's end."""
LINES = ("last", "before", "about", "ends")
"""What an explanation can be made of."""


@register("keywords")
@dataclass
class KeywordsProvider(BaseProvider):
    """Up to three lines, `last: w`, `before: w w`, `about: w, w, w`; a line without words is left out.

    Args:
        lines: their order; one that is not named is not written. There is a fourth one to name, `ends: w w w`: the
            words of `before` and `last` as the text has them, for a reader who reads out the last token.
        n_keywords: words in `about`: those with the highest count × inverse document frequency, ties alphabetical.
        n_before: words in `before`, and in `ends` before the last one.
        max_words: how many of the text's last words are looked at; None for all of them.
        final_space: space at the very end of a text is its last word, written `newline` where there is one in it, else
            `space`: a text that is cut at a token often ends so.

    A row fails (`error`, never an exception) when fewer than two lines are possible, or when its words hold the tags
    that mark an explanation's ends.

    Example:
        >>> provider = make_provider("keywords")
        >>> [e.text for e in provider.explain([ExplainRequest(0, "whales sing; whales dive")])]
        ['last: dive\\nbefore: sing; whales\\nabout: whales, dive, sing']
    """

    n_keywords: int = 3
    n_before: int = 2
    max_words: int | None = None
    final_space: bool = False
    pieces: bool = False
    lines: Sequence[str] = ("last", "before", "about")
    _idf: dict[str, float] = field(init=False, repr=False, default_factory=dict)
    _unseen_idf: float = field(init=False, repr=False, default=1.0)

    def __post_init__(self) -> None:
        check_option("n_keywords", self.n_keywords, (int,), lambda n: n >= 0, "an integer, at least 0")
        check_option("n_before", self.n_before, (int,), lambda n: n >= 0, "an integer, at least 0")
        check_option("n_keywords + n_before", self.n_keywords + self.n_before, (int,), lambda n: n > 0, "at least 1")
        if self.max_words is not None:
            check_option("max_words", self.max_words, (int,), lambda n: n >= 1, "an integer, at least 1, or None")
        for name in ("final_space", "pieces"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} = {getattr(self, name)!r}", "true or false", f"set {name} to one of them")
        known = f"a list of some of {', '.join(LINES)}, each once"
        check_option("lines", self.lines, (list, tuple), lambda names: names and _each_once(names), known)

    def fit(self, documents: Iterable[str]) -> None:
        """Counts in how many documents each word occurs; idf = log((1 + documents) / (1 + documents with the word)).

        Replaces what an earlier call learned. Without documents every word weighs 1: plain counts.
        """
        found_in: Counter[str] = Counter()
        n_documents = 0
        for document in documents:
            n_documents += 1
            found_in.update(set(_words(document)))
        self._idf = {word: math.log((1 + n_documents) / (1 + n)) for word, n in found_in.items()}
        self._unseen_idf = math.log(1 + n_documents) if n_documents else 1.0

    def explain(self, requests: Sequence[ExplainRequest]) -> Iterator[Explanation]:
        for request in requests:
            yield self._explain_row(request)

    def summary(self) -> dict[str, Any]:
        """`max_tokens` is the largest number of words shown; nothing is sampled, so `temperature` is 0."""
        word = "piece" if self.pieces else "word"
        said = {
            "last": (1, f"the last {word}"),
            "before": (self.n_before, f"the {self.n_before} {word}s before it"),
            "about": (
                self.n_keywords,
                f"the {self.n_keywords} words of four letters or more with the highest count times inverse document "
                "frequency",
            ),
            "ends": (1 + self.n_before, f"the last {1 + self.n_before} {word}s"),
        }
        lines = [said[name] for name in self.lines]
        return {
            "model": self.name,
            "max_tokens": sum(words for words, _ in lines),
            "temperature": 0.0,
            "instruction_prompt": "; ".join(what for _, what in lines),
        }

    def _explain_row(self, request: ExplainRequest) -> Explanation:
        text = request.text
        if self.max_words is not None:
            text = " ".join(text.split()[-self.max_words :]) + text[len(text.rstrip()) :]
        words, ends = self._ending(text)
        *before, last = words or [""]
        lines = {
            "last": _cut(last),
            "before": " ".join(map(_cut, before)),
            "about": ", ".join(self._about(text)),
            "ends": " ".join(map(_cut, ends)),
        }
        features = [f"{name}: {lines[name]}" for name in self.lines if lines[name]]
        if len(features) < MIN_FEATURES:
            return Explanation(request.row, None, f"features in the text: {len(features)}, needed: {MIN_FEATURES}")
        body = "\n".join(features)
        if extract_explanation(wrap_explanation(body)) != body:
            return Explanation(request.row, None, "words of the text hold the tags that end an explanation")
        return Explanation(request.row, body, None)

    def _ending(self, text: str) -> tuple[list[str], list[str]]:
        """The words of `before` and `last`, and those of `ends`, as many as there are."""
        written = text.rstrip()
        space = text[len(written) :] if self.final_space else ""
        more = [("newline" if "\n" in space else "space")] if space else []
        count = self.n_before + 1 - len(more)
        if not self.pieces:
            words = written.rsplit(maxsplit=count)[-count:] if count else []
            return [*words, *more], [*words, *more]
        found = list(_PIECE.finditer(written, max(0, len(written) - PIECES_CHARS)))
        found = found[-count:] if count else []
        together = written[found[0].start() :].split() if found else []
        return [*(piece.group() for piece in found), *more], [*together, *more]

    def _about(self, text: str) -> list[str]:
        if not self.n_keywords:
            return []
        idf, unseen = self._idf, self._unseen_idf
        # The word itself breaks ties, so that no hash order shows.
        scored = sorted((-count * idf.get(word, unseen), word) for word, count in Counter(_words(text)).items())
        return [_cut(word) for _, word in scored[: self.n_keywords]]


def _each_once(names: Sequence[Any]) -> bool:
    return all(name in LINES for name in names) and len(set(names)) == len(names)


def _words(text: str) -> list[str]:
    # Lower-cased after matching: some non-ASCII capitals have an ASCII small letter.
    return " ".join(_WORD.findall(text)).lower().split()


def _cut(word: str) -> str:
    return word[:MAX_WORD_CHARS]
