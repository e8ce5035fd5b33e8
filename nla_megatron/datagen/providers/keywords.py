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

# Three letters and fewer are mostly articles and prepositions.
_WORD = re.compile(r"[A-Za-z_]{4,}")
# A ruler of `=` or a pasted hash is one "word"; its start says all there is to say.
MAX_WORD_CHARS = 24


@register("keywords")
@dataclass
class KeywordsProvider(BaseProvider):
    """Up to three lines, `last: w`, `before: w w`, `about: w, w, w`; a line without words is left out.

    Args:
        n_keywords: words in `about`: those with the highest count × inverse document frequency, ties alphabetical.
        n_before: words in `before`.
        max_words: how many of the text's last words are looked at; None for all of them.

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
    _idf: dict[str, float] = field(init=False, repr=False, default_factory=dict)
    _unseen_idf: float = field(init=False, repr=False, default=1.0)

    def __post_init__(self) -> None:
        check_option("n_keywords", self.n_keywords, (int,), lambda n: n >= 0, "an integer, at least 0")
        check_option("n_before", self.n_before, (int,), lambda n: n >= 0, "an integer, at least 0")
        check_option("n_keywords + n_before", self.n_keywords + self.n_before, (int,), lambda n: n > 0, "at least 1")
        if self.max_words is not None:
            check_option("max_words", self.max_words, (int,), lambda n: n >= 1, "an integer, at least 1, or None")

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
        return {
            "model": self.name,
            "max_tokens": 1 + self.n_before + self.n_keywords,
            "temperature": 0.0,
            "instruction_prompt": (
                f"the last word; the {self.n_before} words before it; the {self.n_keywords} words of "
                "four letters or more with the highest count times inverse document frequency"
            ),
        }

    def _explain_row(self, request: ExplainRequest) -> Explanation:
        text = request.text
        if self.max_words is not None:
            text = " ".join(text.split()[-self.max_words :])
        *before, last = text.rsplit(maxsplit=self.n_before + 1)[-(self.n_before + 1) :] or [""]
        lines = {"last": _cut(last), "before": " ".join(map(_cut, before)), "about": ", ".join(self._about(text))}
        features = [f"{name}: {words}" for name, words in lines.items() if words]
        if len(features) < MIN_FEATURES:
            return Explanation(request.row, None, f"features in the text: {len(features)}, needed: {MIN_FEATURES}")
        body = "\n".join(features)
        if extract_explanation(wrap_explanation(body)) != body:
            return Explanation(request.row, None, "words of the text hold the tags that end an explanation")
        return Explanation(request.row, body, None)

    def _about(self, text: str) -> list[str]:
        if not self.n_keywords:
            return []
        idf, unseen = self._idf, self._unseen_idf
        # The word itself breaks ties, so that no hash order shows.
        scored = sorted((-count * idf.get(word, unseen), word) for word, count in Counter(_words(text)).items())
        return [_cut(word) for _, word in scored[: self.n_keywords]]


def _words(text: str) -> list[str]:
    # Lower-cased after matching: some non-ASCII capitals have an ASCII small letter.
    return " ".join(_WORD.findall(text)).lower().split()


def _cut(word: str) -> str:
    return word[:MAX_WORD_CHARS]
