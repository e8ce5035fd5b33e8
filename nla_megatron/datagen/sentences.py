"""Which sentence each token of a text is in, by its punctuation alone."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence

_END = re.compile(r"""[.!?…]+["'”’)\]]*\s+|[。！？]+[」』”’）]*\s*|\s*\n\s*\n\s*""")
"""An abbreviation before a space ends a sentence too; a number's point does not."""


def sentence_starts(text: str) -> list[int]:
    """The index of each sentence's first character; space behind a sentence is still its own.

    Example:
        >>> sentence_starts("It is 3.5. Is it? Yes")
        [0, 11, 18]
    """
    return [0, *(found.end() for found in _END.finditer(text) if found.end() < len(text))]


def sentences_of(text: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """The number of each token's sentence, by the token's last character; -1 for a token of no characters.

    Args:
        offsets: of each token, its first character and the one after its last, as fast tokenizers give them.
    """
    starts = sentence_starts(text)
    return [bisect_right(starts, stop - 1) - 1 if stop > first else -1 for first, stop in offsets]
