"""Answers by hand: what is a number, what is the same, what must never pass for the same."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nla_megatron.tasks.math.answers import equal, normalised, number, readable

NUMBERS: list[tuple[str, str | None]] = [
    ("18", "18"),
    ("-7", "-7"),
    ("−7", "-7"),
    ("+3", "3"),
    ("007", "7"),
    ("-0", "0"),
    ("1.", "1"),
    (".5", "1/2"),
    ("2.50", "5/2"),
    ("1,234", "1234"),
    ("1,234,567.5", "2469135/2"),
    ("1{,}234", "1234"),
    ("12\\,345", "12345"),
    ("1 234 567", "1234567"),
    ("1,23", None),
    ("12,34", None),
    ("3 4", None),
    ("(1,234)", None),
    ("$5", "5"),
    ("\\$1,000.50", "2001/2"),
    ("£3", "3"),
    ("50%", "50"),
    ("50\\%", "50"),
    ("3/4", "3/4"),
    ("-3/4", "-3/4"),
    ("1/0", None),
    ("1/2/3", None),
    ("\\frac{3}{4}", "3/4"),
    ("\\dfrac{-3}{4}", "-3/4"),
    ("-\\tfrac{1}{2}", "-1/2"),
    ("\\frac34", "3/4"),
    ("\\frac3{4}", "3/4"),
    ("\\frac{3}4", "3/4"),
    ("\\frac{1.5}{3}", "1/2"),
    ("\\frac{1}{0}", None),
    ("\\frac{\\pi}{2}", None),
    ("1\\frac{1}{2}", "3/2"),
    ("-1\\frac{1}{2}", "-3/2"),
    ("1 1/2", "3/2"),
    ("-1 1/2", "-3/2"),
    ("1.5e3", "1500"),
    ("1.5E-3", "3/2000"),
    ("1.5\\times10^{3}", "1500"),
    ("1.5 \\times 10^3", "1500"),
    ("2 \\cdot 10^{-2}", "1/50"),
    ("10^{3}", "1000"),
    ("1e400", None),
    ("5 apples", "5"),
    ("18 dollars.", "18"),
    ("60 miles per hour", "60"),
    ("12 cm^2", "12"),
    ("5cm", "5"),
    ("5\\ cm", "5"),
    ("5\\text{ cm}", "5"),
    ("0.5 \\text{ m}^2", "1/2"),
    ("5 \\mathrm{~m}", "5"),
    ("\\frac{1}{2}\\text{ hours}", "1/2"),
    ("5x", None),
    ("5 x", None),
    ("5m", None),
    ("5 pi", None),
    ("5\\pi", None),
    ("3 hours and 20 minutes", None),
    ("90^\\circ", "90"),
    ("90^{\\circ}", "90"),
    ("45°", "45"),
    ("x=5", "5"),
    ("x = \\frac{1}{2}", "1/2"),
    ("y_{1} = 3", "3"),
    ("$18$", "18"),
    ("\\(18\\)", "18"),
    ("\\[ 18 \\]", "18"),
    ("$$18$$", "18"),
    ("\\left(18\\right)", "18"),
    ("--5", None),
    ("1.2.3", None),
    ("five", None),
    ("2^{10}", None),
    ("3:4", None),
    ("", None),
    ("   ", None),
    ("NaN", None),
    ("inf", None),
    ("0x10", None),
    ("1_000", None),
    ("٣", "3"),
    ("\\sqrt{4}", None),
    ("{5}", "5"),
    ("{{5}}", "5"),
    ("{1}{2}", None),
    ("\\boxed{5}", "5"),
    ("$\\boxed{{5}}$", "5"),
    ("\\boxed{1{,}080}", "1080"),
    ("-3 degrees", "-3"),
    ("$5 million", "5000000"),
    ("\\$1.5\\text{ million}", "1500000"),
    ("5 \\text{ million dollars}", "5000000"),
    ("3 hundred thousand", "300000"),
    ("2 dozen eggs", "24"),
    ("2 thirds", "2/3"),
    ("2 thirds of a cup", "2/3"),
    ("3 halves", "3/2"),
    ("5 tenths", "1/2"),
    ("5 seconds", "5"),
    ("5 quarters", "5"),
    ("5 squared", None),
    ("5 factorial", None),
    ("5 or more", None),
    ("5 apples or pears", None),
    ("5 hours and a half", None),
    ("5 \\text{ or } ", None),
    ("6 p.m.", "6"),
    ("6 PM", "6"),
    ("6pm", "6"),
    ("6 \\text{ p.m.}", "6"),
    ("6:30 p.m.", None),
]


@pytest.mark.parametrize(("answer", "value"), NUMBERS)
def test_numbers_are_read_exactly_and_nothing_else_is_one(answer: str, value: str | None) -> None:
    assert number(answer) == (None if value is None else Fraction(value))


SAME = [
    ("0.5", "\\frac{1}{2}"),
    ("50", "50.0"),
    ("1,000", "1000"),
    ("0.3333333", "1/3"),
    ("1e3", "1000"),
    ("5 apples", "5 \\text{ pears}"),
    ("\\text{Yes}", "Yes"),
    ("(1,2)", "(1, 2)"),
    ("\\left(1,2\\right)", "(1,2)"),
    ("(0.5,1)", "(\\frac12,1.0)"),
    ("[0, \\infty)", "[0,\\infty)"),
    ("\\{1,2\\}", "\\{ 1, 2 \\}"),
    ("4\\pi \\text{ cm}^2", "4\\pi"),
    ("\\dfrac {\\pi}{2}", "\\frac{\\pi}{2}"),
    ("\\sqrt2", "\\sqrt{2}"),
    ("x = 2\\sqrt{3}", "2\\sqrt{3}"),
    ("\\dfrac{x}{y}", "\\frac{x}{y}"),
    ("\\text{(A)}", "(A)"),
    ("2x+3.", "2x + 3"),
    ("((1,2),3)", "((1.0,2),3)"),
    ("{5}", "5"),
    ("\\boxed{\\frac12}", "0.5"),
    ("{\\pi}", "\\pi"),
    ("$5 million", "5,000,000"),
    ("Yes", "yes"),
    ("\\text{even}", "Even"),
    ("\\{2,0.5,1\\}", "\\{1,2,\\frac12\\}"),
    ("$\\boxed{\\text{(A)}}$", "A"),
    ("(5)", "5"),
    ("\\left(5\\right)", "5"),
    ("\\boxed{5}.", "5"),
    ("$5\\%$.", "5"),
    ("5,", "5"),
    ("{\\bf 5}", "5"),
    ("= 5", "5"),
    ("6 p.m.", "6"),
    ("6 p.m.", "6 PM"),
    ("6:30 \\text{ p.m.}", "6:30"),
]
DIFFERENT = [
    ("18", "81"),
    ("0.333", "1/3"),
    ("0", "1e-9"),
    ("3 4", "34"),
    ("1 1/2", "11/2"),
    ("-5", "5"),
    ("5", "5x"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "[1,2]"),
    ("(1,2)", "(1,2,3)"),
    ("(1,2)", "1,2"),
    ("\\sqrt{4}", "2"),
    ("AB", "ab"),
    ("a", "A"),
    ("1000000", "1000001"),
    ("12,345,678", "12345679"),
    ("\\{1,2\\}", "\\{1,2,2\\}"),
    ("\\{1,1,2\\}", "\\{1,2,2\\}"),
    ("(1,2)", "1"),
    ("(x+1)(x-1)", "x+1)(x-1"),
    ("5=5", "5"),
    ("\\frac{\\pi}{2}", "\\frac{\\pi}{3}"),
    ("5\\pi", "5"),
    ("", ""),
    ("", "0"),
    ("1000000", "1000002"),
    ("$5 million", "5"),
    ("5\\text{ million}", "5"),
    ("5\\pi \\text{ million}", "5\\pi"),
    ("2 thirds", "2"),
    ("6 p.m.", "6 a.m."),
    ("6:30 p.m.", "6:30 a.m."),
    ("{1}{2}", "12"),
]


@pytest.mark.parametrize(("answer", "reference"), SAME)
def test_the_same_answer_in_another_spelling_is_right(answer: str, reference: str) -> None:
    assert equal(answer, reference) and equal(reference, answer)


@pytest.mark.parametrize(("answer", "reference"), DIFFERENT)
def test_another_answer_is_wrong(answer: str, reference: str) -> None:
    assert not equal(answer, reference) and not equal(reference, answer)


def test_the_tolerance_is_relative_and_one_in_a_million() -> None:
    assert equal("1000000.5", "1000000") and equal("0.000001000001", "1e-6")
    assert not equal("1000001.1", "1000000") and not equal("0.0000010000011", "1e-6")


@given(st.integers(-(10**12), 10**12), st.integers(1, 10**6))
def test_a_fraction_equals_its_quotient_however_it_is_written(above: int, below: int) -> None:
    assert number(f"\\frac{{{above}}}{{{below}}}") == number(f"{above}/{below}") == Fraction(above, below)
    assert number(f"{above:,}") == above == number(f"${above:,}$")


@given(st.text(max_size=300))
def test_no_text_breaks_the_comparison_and_every_readable_text_equals_itself(text: str) -> None:
    assert equal(text, text) is bool(number(text) is not None or normalised(text))


@pytest.mark.parametrize(
    "text",
    [
        "9" * 1_000_000,
        "1e" + "9" * 180,
        "5 " + "a" * 190 + "!",
        "5" + " a" * 90 + "!",
        "\\ " * 500_000,
        "(" * 500_000 + ",",
        "{" * 90 + "5" + "}" * 90,
        "\\boxed" * 200_000,
        "{" * 200_000,
    ],
    ids=range(9),
)
@pytest.mark.timeout(120)
def test_an_answer_made_to_cost_time_costs_none(text: str) -> None:
    """Were it more than in proportion to the length, the long ones would not end within the limit."""
    equal(text, text)
    equal(text, "5")


@pytest.mark.parametrize(
    ("reference", "fine"),
    [("18", True), ("x^2", True), (None, False), ("", False), ("  ", False), ("$ $", False), ("\\frac{1}{2", False),
     ("\\{1,2\\}", True), ("\\{1,2", True)],
)  # fmt: skip
def test_a_reference_is_unreadable_where_nothing_is_left_or_braces_are_open(reference: str | None, fine: bool) -> None:
    assert readable(reference) is fine
