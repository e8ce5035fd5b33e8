r"""What a response to a mathematical problem says: its thinking, its format, its answer in `\boxed{}`.

The strict format, of a response without the space around it:

1. it begins with the opening tag (unless the prompt ends with that tag: then it begins inside the block, without one);
2. each tag stands in it exactly once, the closing one after the opening one, so that there is exactly one block;
3. after the block comes an answer with exactly one `\boxed{…}`, whose braces are balanced and whose content is not
   blank; text may stand before the box, after it only space, a full stop and closing marks of mathematics
   (`$`, `\)`, `\]`);
4. the policy ended it itself: a truncated response has no format.

The lenient answer is the last balanced, non-blank box behind the last closing tag, or anywhere where there is none; of
a box in a box the inner one, of `\boxed 5` the 5. If there is no box at all, it is what follows the last `####`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_BOXES = ("\\boxed", "\\fbox")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
# Without braces TeX boxes one character; who writes so means the number or the command.
_BARE_BOX = re.compile(
    r"\\(?:boxed|fbox)(?![a-zA-Z])\s*"
    r"([+\-−]?\d+(?:(?:,|\{,\})\d{3})*(?:\.\d+)?(?:/\d+)?|\\[a-zA-Z]+(?:\s*(?:\{[^{}]*\}|\d))*|[a-zA-Z0-9])"
)
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_DEEPEST = 8
_TAIL = re.compile(r"(?:\s|\.|\$|\\\)|\\\])*")


@dataclass(frozen=True)
class Tags:
    """Around the thinking block. `opened`: the prompt ends with the opening tag, so responses have none."""

    open: str = "<think>"
    close: str = "</think>"
    opened: bool = False


@dataclass(frozen=True)
class Reading:
    """`thinking`: text of the thinking block, also of one that never closes; "" without one.

    `strict`, `lenient`: the answer under either parse, None where there is none.
    """

    thinking: str
    strict: str | None
    lenient: str | None


def read_response(text: str, tags: Tags, finished: bool = True) -> Reading:
    """A response as the strict and the lenient parse see it; see the module's docstring."""
    return Reading(_thinking(text, tags), strict_answer(text, tags) if finished else None, lenient_answer(text, tags))


def strict_answer(text: str, tags: Tags) -> str | None:
    """The content of the box of a response in exactly the format that was asked for, stripped; else None."""
    body = text.strip()
    if body.count(tags.close) != 1 or body.count(tags.open) != (0 if tags.opened else 1):
        return None
    if not tags.opened and not body.startswith(tags.open):
        return None
    start = 0 if tags.opened else len(tags.open)
    end = body.find(tags.close, start)
    if end < 0:
        return None
    answer = body[end + len(tags.close) :]
    found = list(boxes(answer))
    if len(found) != 1 or sum(answer.count(name) for name in _BOXES) != 1:
        return None
    content, stop = found[0]
    return content.strip() or None if _TAIL.fullmatch(answer, stop) else None


def lenient_answer(text: str, tags: Tags) -> str | None:
    """The last box of the answer, or what follows the last `####`."""
    answer = text.rpartition(tags.close)[2]
    return last_box(answer) or after_hashes(answer)


def last_box(text: str) -> str | None:
    r"""The content of the last box that is balanced and not blank, or of `\boxed 5`, stripped; of a box in a box the
    inner one.
    """
    found: str | None = None
    for _ in range(_DEEPEST):
        inner = _last(text if found is None else found)
        if inner is None:
            break
        found = inner
    return found


def _last(text: str) -> str | None:
    braced = [(at, content.strip()) for content, at in boxes(text)]
    inside = [(at - len(content) - 1, at) for content, at in boxes(text)]
    bare = [
        (each.end(), each[1].strip())
        for each in _BARE_BOX.finditer(text)
        if not any(start <= each.start() < end for start, end in inside)
    ]
    return max((each for each in (*braced, *bare) if each[1]), default=(0, None))[1]


def after_hashes(text: str) -> str | None:
    """What follows the last `####` on its line, stripped; None where nothing does."""
    _, mark, rest = text.rpartition("####")
    return (rest.strip().splitlines() or [""])[0].strip() or None if mark else None


def boxes(text: str) -> Iterator[tuple[str, int]]:
    r"""(content, index after the closing brace) of every outermost `\boxed{…}` whose braces balance.

    `\{` and `\}` are characters, not braces. A box that never closes is passed over.
    """
    closing, at = _braces(text), 0
    for found in _BOX.finditer(text):
        end = closing.get(found.end() - 1)
        if end is not None and found.start() >= at:
            at = end + 1
            yield text[found.end() : end], at


def _braces(text: str) -> dict[int, int]:
    """Of every brace that closes, where it does. One pass: a policy may repeat a box that never closes."""
    pairs: dict[int, int] = {}
    opened: list[int] = []
    for found in _BRACE.finditer(text):
        if found[0] == "{":
            opened.append(found.start())
        elif found[0] == "}" and opened:
            pairs[opened.pop()] = found.start()
    return pairs


def _thinking(text: str, tags: Tags) -> str:
    if tags.opened:
        return text.partition(tags.close)[0]
    return text.partition(tags.open)[2].partition(tags.close)[0]
