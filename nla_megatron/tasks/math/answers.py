r"""Short answers made comparable: numbers as exact fractions, everything else as LaTeX in one spelling.

Numbers: `1,234`, `1{,}234`, `$5`, `50\%`, `3/4`, `\frac{3}{4}`, `1\frac{1}{2}`, `.5`, `1.5e3`, `1.5\times10^{3}`, with
units or words behind them, and with `x=` in front. A percent sign and a unit say nothing of the value: 50\% is 50. A
word that says something of it is read: `$5 million` is 5,000,000, `2 thirds` is 2/3; one that makes it another thing
(`5 squared`, `5 or more`) leaves no number. Of a time of day, `6 p.m.` is 6, and is not `6 a.m.`. Two whole numbers are
equal where they are the same, others within a relative 1e-6; tuples and intervals in brackets are compared part by
part, sets in any order; all else has to be the same text after normalisation, a word with or without a capital.
Braces, boxes and parentheses around the whole are not there: `(A)` is A. Nothing is simplified: `\sqrt{4}` is not 2.

math-verify would simplify. It is not asked: what it does within its limit of time depends on the machine's load, while
every rank has to give a response the same reward; it also takes `$5 million` for 5, `50\%` for 0.5, `1 1/2` for 1.
"""

from __future__ import annotations

import re
from fractions import Fraction

TOLERANCE = Fraction(1, 10**6)
LONGEST = 200
"""Characters of an answer that may be a number: a policy that writes a million digits must cost nothing."""
_LARGEST_EXPONENT, _LONGEST_TEXT = 300, 2000

_DECIMAL = r"[+-]?(?:\d+\.?\d*|\.\d+)"
_POWER = re.compile(rf"({_DECIMAL})(?:[eE]|(?:\\times|\\cdot|\*|×)10\^)\{{?([+-]?\d+)\}}?")
_BARE_POWER = re.compile(r"([+-]?)10\^\{?([+-]?\d+)\}?")
_QUOTIENT = re.compile(rf"({_DECIMAL})/({_DECIMAL})")
_FRACTION = re.compile(rf"([+-]?)(?:(\d+)\+?)?\\frac\{{({_DECIMAL})\}}\{{({_DECIMAL})\}}")
_GROUPED = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d*)?")
_MIXED = re.compile(r"([+-]?)(\d+)\s+(\d+)/(\d+)")
_SPACES = re.compile(r"\s+")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}")
# Words of a formula are no unit: 5 pi is not 5.
_UNIT_WORDS = re.compile(
    r"(?<=[\d.}])\s+(?!(?:pi|sqrt|sin|cos|tan|log|ln|exp|mod|or|and|i|e)\b)"
    r"[A-Za-z]{2,}\.?(?:[ /-]+[A-Za-z]+\.?)*(?:\^\{?[23]\}?)?$"
)
# Without a space only what cannot be a variable.
_ATTACHED = re.compile(
    r"(?<=\d)(?:[cmk]m|[mk]g|ml|kW|kWh|hours?|hrs?|mins?|secs?|mph|km/h|m/s|cents?)(?:\^\{?[23]\}?)?$"
)
_TEXT_UNIT = re.compile(r"(.*?[^\s\\])[\s\\]*\\(?:text|mathrm|mbox|textrm)\s*\{([^{}]*)\}(?:\^\{?[23]\}?)?")
_SCALES = {
    "hundred": Fraction(100), "thousand": Fraction(10**3), "million": Fraction(10**6), "billion": Fraction(10**9),
    "trillion": Fraction(10**12), "dozen": Fraction(12), "half": Fraction(1, 2), "halve": Fraction(1, 2),
    "third": Fraction(1, 3), "fourth": Fraction(1, 4), "fifth": Fraction(1, 5), "sixth": Fraction(1, 6),
    "seventh": Fraction(1, 7), "eighth": Fraction(1, 8), "ninth": Fraction(1, 9), "tenth": Fraction(1, 10),
    "hundredth": Fraction(1, 100), "thousandth": Fraction(1, 1000), "millionth": Fraction(1, 10**6),
}  # fmt: skip
"""Words behind a number that it is multiplied by. Seconds and quarters are mostly those of a clock and of a dollar."""
_NO_UNIT = frozenset(
    "squared cubed factorial plus minus times over divided multiplied to than or and not point power root mod modulo "
    "equals less more greater between pi".split()
)
"""Words behind a number that make something else of it."""
_TIME = re.compile(r"(?<=\d)\s*([ap])\.?\s?m\b\.?(?=\s*$)", re.IGNORECASE)
_BOXED = ("\\boxed", "\\fbox")
_MOST_WRAPPED = 8
_LARGEST_SET = 50
_WORD = re.compile(r"[A-Za-z]{2,}")
_GROUPED_BY_SPACE = re.compile(r"([+-]?\d{1,3})((?: \d{3})+)(?![\d/])")
_ASSIGNED = re.compile(r"(?:[A-Za-z](?:_\{?\w+\}?)?\s*)?=\s*([^=]+)")
_PARENTHESISED = re.compile(r"\([^(),;]*\)")
_SENTENCE_ENDS = ("}.", "$.", ").", "].")
_WRAPPERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_BRACKETS = {"(": ")]", "[": ")]", "\\{": ("\\}",)}


def equal(answer: str, reference: str) -> bool:
    """Whether two answers are the same, by the rules above."""
    if len({half for text in (answer, reference) if (half := _half_of_day(text))}) > 1:
        return False
    first, second = number(answer), number(reference)
    if first is not None and second is not None:
        whole = first.denominator == second.denominator == 1
        return first == second if whole else abs(first - second) <= TOLERANCE * max(abs(first), abs(second))
    if first is not None or second is not None:
        return False
    one, other = normalised(answer), normalised(reference)
    if one == other or (_WORD.fullmatch(one) and _uncapitalised(one) == _uncapitalised(other)):
        return bool(one)
    ours, theirs = _parts(one), _parts(other)
    if ours is None or theirs is None or ours[0] != theirs[0] or len(ours[1]) != len(theirs[1]):
        return False
    if ours[0].startswith("\\{"):
        return _same_set(ours[1], theirs[1])
    return all(equal(a, b) for a, b in zip(ours[1], theirs[1], strict=True))


def _same_set(ours: list[str], theirs: list[str]) -> bool:
    if len(ours) > _LARGEST_SET:
        return False
    left = list(theirs)
    for one in ours:
        found = next((at for at, other in enumerate(left) if equal(one, other)), None)
        if found is None:
            return False
        del left[found]
    return True


def _uncapitalised(word: str) -> str:
    return word[:1].lower() + word[1:]


def number(answer: str) -> Fraction | None:
    """The value of an answer that is a number; None for any other, and for one too long or too large to be meant."""
    if len(answer) > LONGEST:
        return None
    text, scale = _without_unit(_spelled(answer))
    value = _bare(text)
    return None if value is None or scale is None else value * scale


def _bare(text: str) -> Fraction | None:
    mixed = _MIXED.fullmatch(text)
    if mixed is not None:
        return _mixed(mixed[1], mixed[2], mixed[3], mixed[4])
    text = _GROUPED_BY_SPACE.sub(lambda found: found[1] + found[2].replace(" ", ""), text)
    # A space between two digits separates two numbers.
    return None if re.search(r"[\d.] +[\d.]", text) else _value(_SPACES.sub("", text))


def normalised(answer: str) -> str:
    """One spelling of an answer: no space, no sizes of brackets, plain fractions and roots, no wrapping dollars."""
    if len(answer) > _LONGEST_TEXT:
        return _SPACES.sub("", answer)
    text = _spelled(answer)
    unit = _TEXT_UNIT.fullmatch(text)
    bare = _SPACES.sub("", _TEXT.sub(r"\1", unit[1] if unit and _scale(unit[2]) == 1 else text)).rstrip(".")
    return _without_parentheses(bare)


def readable(reference: str | None) -> bool:
    """Whether a reference can be compared with at all: there is something left of it, and its braces balance."""
    if reference is None or not normalised(reference):
        return False
    bare = re.sub(r"\\[{}]", "", reference)
    return bare.count("{") == bare.count("}")


def _spelled(answer: str) -> str:
    """The answer without what only sets or decorates it; spaces stay, because units begin behind one."""
    text = _unwrapped(answer)
    text = re.sub(r"\\(?:left|right|displaystyle|[bB]igg?[lr]?|bf|rm|it)(?![a-zA-Z])", "", text)
    text = re.sub(r"\\[;: ]|\\q?quad(?![a-zA-Z])|~", " ", text).replace("\\,", "")
    text = text.replace("{,}", ",").replace("−", "-").replace("–", "-").replace("\\!", "").replace("\u00a0", " ")
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\\(frac|sqrt)\s+", r"\\\1", text)
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac(\{[^{}]*\})(\w)", r"\\frac\1{\2}", text)
    text = re.sub(r"\\frac(\w)(\{[^{}]*\})", r"\\frac{\1}\2", text)
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|°|\\degree(?![a-zA-Z])", "", text)
    text = re.sub(r"\\?[$£€%]", "", text)
    text = _TIME.sub("", text)
    assigned = _ASSIGNED.fullmatch(text)
    return _without_parentheses((assigned[1] if assigned else text).strip())


def _without_parentheses(text: str) -> str:
    """`(5)` as 5; `(1,2)` is a pair, and stays."""
    return text[1:-1].strip() if _PARENTHESISED.fullmatch(text) else text


def _without_unit(text: str) -> tuple[str, Fraction | None]:
    """The number before a unit or words, the text itself where it does not begin with one; and what the words multiply
    it by, None where they make something else of it.
    """
    text = text.rstrip(".,; ")
    unit = _TEXT_UNIT.fullmatch(text)
    words = unit[2] if unit else ""
    text = _TEXT.sub(r"\1", unit[1] if unit else text)
    found = _UNIT_WORDS.search(text)
    if found is not None:
        text, words = text[: found.start()], f"{found[0]} {words}"
    return _ATTACHED.sub("", text).strip(), _scale(words)


def _scale(words: str) -> Fraction | None:
    scale = Fraction(1)
    for word in re.findall(r"[a-z]+", words.lower()):
        if word in _NO_UNIT:
            return None
        scale *= _SCALES.get(word, _SCALES.get(word.removesuffix("s"), Fraction(1)))
    return scale


def _half_of_day(text: str) -> str:
    """a or p of a time of day, "" of anything else."""
    found = _TIME.search(_spelled_time(text))
    return found[1].lower() if found else ""


def _spelled_time(text: str) -> str:
    return _TEXT.sub(r"\1", _unwrapped(text))[-_MOST_WRAPPED:]


def _unwrapped(answer: str) -> str:
    """The answer without dollars, braces and boxes around the whole of it, and a full stop behind them."""
    text = answer.strip()
    for _ in range(_MOST_WRAPPED):
        before = text
        for left, right in _WRAPPERS:
            if text.startswith(left) and text.endswith(right) and len(text) > len(left) + len(right):
                text = text[len(left) : -len(right)].strip()
        for name in _BOXED:
            inner = text.removeprefix(name).lstrip()
            if inner != text and inner.startswith("{") and closes_at_end(inner):
                text = inner
        if text.startswith("{") and closes_at_end(text):
            text = text[1:-1].strip()
        if text.endswith(_SENTENCE_ENDS):
            text = text[:-1]
        if text == before:
            break
    return text


def closes_at_end(text: str) -> bool:
    """Whether the brace that a text begins with is closed by its last character and by none before."""
    depth = 0
    for found in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if not depth:
            return found.end() == len(text)
    return False


def _value(text: str) -> Fraction | None:
    if _GROUPED.fullmatch(text):
        text = text.replace(",", "")
    if re.fullmatch(_DECIMAL, text):
        return Fraction(text.rstrip("."))
    if power := _POWER.fullmatch(text):
        return _scaled(Fraction(power[1].rstrip(".")), power[2])
    if power := _BARE_POWER.fullmatch(text):
        return _scaled(Fraction(f"{power[1]}1"), power[2])
    if quotient := _QUOTIENT.fullmatch(text):
        return _quotient(quotient[1], quotient[2])
    if found := _FRACTION.fullmatch(text):
        return _mixed(found[1], found[2] or "0", found[3], found[4])
    return None


def _scaled(value: Fraction, exponent: str) -> Fraction | None:
    power = int(exponent)
    return value * Fraction(10) ** power if abs(power) <= _LARGEST_EXPONENT else None


def _quotient(above: str, below: str) -> Fraction | None:
    divisor = Fraction(below.rstrip("."))
    return Fraction(above.rstrip(".")) / divisor if divisor else None


def _mixed(sign: str, whole: str, above: str, below: str) -> Fraction | None:
    part = _quotient(above, below)
    return None if part is None else (Fraction(whole) + part) * (-1 if sign == "-" else 1)


def _parts(text: str) -> tuple[str, list[str]] | None:
    """(brackets, parts) of a tuple, an interval or a set; None for anything else, and for a single part."""
    opening = next((each for each in _BRACKETS if text.startswith(each)), None)
    if opening is None:
        return None
    closing = next((each for each in _BRACKETS[opening] if text.endswith(each)), None)
    if closing is None:
        return None
    parts, depth, current = [], 0, ""
    for character in text[len(opening) : -len(closing)]:
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0)
        if character == "," and not depth:
            parts.append(current)
            current = ""
        else:
            current += character
    parts.append(current)
    return (opening + closing, parts) if len(parts) > 1 and all(parts) else None
