r"""The strict format and the lenient parse, case by case."""

from __future__ import annotations

import pytest

from nla_megatron.tasks.math.responses import (
    Tags,
    after_hashes,
    boxes,
    last_box,
    lenient_answer,
    read_response,
    strict_answer,
)

TAGS = Tags()
OPENED = Tags(opened=True)

# response, strict answer, lenient answer
CASES: list[tuple[str, str | None, str | None]] = [
    ("<think>2+2</think>\\boxed{4}", "4", "4"),
    ("  <think>2+2</think>\n\nThe answer is \\boxed{4}.  \n", "4", "4"),
    ("<think>a</think> $\\boxed{4}$.", "4", "4"),
    ("<think>a</think> \\(\\boxed{4}\\)", "4", "4"),
    ("<think>a</think> \\[ \\boxed{4} \\]", "4", "4"),
    ("<think></think>\\boxed{4}", "4", "4"),
    ("<think>a</think>\\boxed{\\frac{1}{\\sqrt{2}}}", "\\frac{1}{\\sqrt{2}}", "\\frac{1}{\\sqrt{2}}"),
    ("<think>a</think>\\boxed{\\{1,2\\}}", "\\{1,2\\}", "\\{1,2\\}"),
    ("<think>a</think>\\boxed { 4 }", "4", "4"),
    ("<think>a</think>\\fbox{4}", "4", "4"),
    ("<think>\\boxed{3} no</think>\\boxed{4}", "4", "4"),
    # something is wrong from here on
    ("<think>a</think>\\boxed{4} apples", None, "4"),
    ("<think>a</think>\\boxed{4} and \\boxed{5}", None, "5"),
    ("<think>a</think>\\boxed{\\boxed{4}}", None, "4"),
    ("<think>a</think>$\\boxed 5$.", None, "5"),
    ("<think>a</think>$\\boxed5$ or so", None, "5"),
    ("<think>a</think>$\\boxed\\frac{1}{2}$", None, "\\frac{1}{2}"),
    ("<think>a</think>$\\boxed\\frac12$", None, "\\frac12"),
    ("<think>a</think>\\boxed -1,080.", None, "-1,080"),
    ("<think>a</think>\\boxedly 5", None, None),
    ("<think>a</think>\\boxed{3}, no: \\boxed 4.", None, "4"),
    ("<think>a</think>\\boxed 3, no: \\boxed{\\boxed 4}", None, "4"),
    ("<think>a</think>\\boxed{x=\\boxed{4}}", None, "4"),
    ("<think>a</think>\\boxed{}", None, None),
    ("<think>a</think>\\boxed{  }", None, None),
    ("<think>a</think>\\boxed{3}\\boxed{ }", None, "3"),
    ("<think>a</think>\\boxed{4", None, None),
    ("<think>a</think>\\boxed{\\frac{1}{2}", None, None),
    ("<think>a</think>4", None, None),
    ("<think>a</think>", None, None),
    ("<think>a", None, None),
    ("<think>a \\boxed{4}", None, "4"),
    ("\\boxed{4}", None, "4"),
    ("Well. <think>a</think>\\boxed{4}", None, "4"),
    ("<think>a</think><think>b</think>\\boxed{4}", None, "4"),
    ("<think>a<think>b</think>\\boxed{4}", None, "4"),
    ("<think>a</think>b</think>\\boxed{4}", None, "4"),
    ("</think>a<think>\\boxed{4}", None, "4"),
    ("a</think>\\boxed{4}", None, "4"),
    ("<think>\\boxed{3}</think> four", None, None),
    ("<THINK>a</THINK>\\boxed{4}", None, "4"),
    ("so\n#### 18", None, "18"),
    ("#### 17\n#### 18 \nend", None, "18"),
    ("<think>#### 17</think>", None, None),
    ("####", None, None),
    ("", None, None),
]


@pytest.mark.parametrize(("text", "strict", "lenient"), CASES)
def test_both_parses_of_a_response(text: str, strict: str | None, lenient: str | None) -> None:
    found = read_response(text, TAGS)
    assert (found.strict, found.lenient) == (strict, lenient)


@pytest.mark.parametrize(
    ("text", "strict"),
    [
        ("2+2</think>\\boxed{4}", "4"),
        ("</think>\\boxed{4}", "4"),
        ("<think>2+2</think>\\boxed{4}", None),
        ("2+2 \\boxed{4}", None),
    ],
)
def test_a_prompt_that_opens_the_block_leaves_only_its_end_to_the_response(text: str, strict: str | None) -> None:
    assert strict_answer(text, OPENED) == strict


def test_a_truncated_response_has_no_format_whatever_it_says() -> None:
    found = read_response("<think>a</think>\\boxed{4}", TAGS, finished=False)
    assert (found.strict, found.lenient) == (None, "4")


@pytest.mark.parametrize(
    ("text", "tags", "thinking"),
    [
        ("<think>a b</think>c", TAGS, "a b"),
        ("x<think>a b", TAGS, "a b"),
        ("a b", TAGS, ""),
        ("<think>a</think><think>b</think>", TAGS, "a"),
        ("a b</think>c", OPENED, "a b"),
        ("a b", OPENED, "a b"),
    ],
)
def test_thinking_is_what_stands_in_the_first_block_even_an_open_one(text: str, tags: Tags, thinking: str) -> None:
    assert read_response(text, tags).thinking == thinking


def test_other_tags_can_be_asked_for() -> None:
    assert strict_answer("[work]a[/work] \\boxed{4}", Tags("[work]", "[/work]")) == "4"


def test_boxes_are_the_outermost_balanced_ones_in_order() -> None:
    text = "\\boxed{a{b}c} \\boxed{open \\boxed{d}"
    assert [content for content, _ in boxes(text)] == ["a{b}c", "d"]
    assert [text[end - 1] for _, end in boxes(text)] == ["}", "}"]


@pytest.mark.timeout(120)
def test_a_box_that_is_repeated_and_never_closes_is_read_in_one_pass() -> None:
    """A policy that has run wild writes that as long as it may, in every response of a step."""
    assert lenient_answer("\\boxed{" * 300_000 + "4}", TAGS) == "4"


def test_the_references_of_both_kinds_of_files() -> None:
    gsm8k = "She sold 48/2 = <<48/2=24>>24.\n#### 1,072"
    assert after_hashes(gsm8k) == "1,072"
    assert last_box("First \\boxed{1}, so the answer is $\\boxed{\\dfrac{9}{7}}$.") == "\\dfrac{9}{7}"
