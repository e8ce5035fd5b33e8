"""The page of an evaluation: whatever a model writes is shown as text, and what is not there is left out."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from nla_megatron.evaluation.answers_report import write_answers_report

RESULTS: dict[str, Any] = {
    "task": "math", "rows": 2, "samples": 1, "accuracy": 0.5, "accuracy_ci95": [0.0, 1.0], "format_rate": 0.25,
    "thinking_tokens_mean": 12.5, "thinking_tokens_median": 11.0, "thinking_tokens_p90": 20.0,
    "accuracy_by_level": {"Level 1": 0.75},
}  # fmt: skip
EXAMPLE: dict[str, Any] = {
    "row": 3, "prompt": "Is <b>1 < 2</b>?", "response": "<think>&amp;</think> half \ud83d", "reference": "yes",
    "answer": None, "level": "1", "subject": "", "finished": False, "correct": 1.0,
}  # fmt: skip


class Page(HTMLParser):
    """The text of a page, and every tag that was opened."""

    def __init__(self, html: str):
        super().__init__()
        self.words, self.tags = "", []  # type: tuple[str, list[str]]
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.words += data


def page(path: Path, results: dict[str, Any], examples: list[dict[str, Any]]) -> Page:
    write_answers_report(path / "report.html", "math", "accuracy", results, examples)
    return Page((path / "report.html").read_text(encoding="utf-8"))


def test_what_a_model_writes_is_text_on_the_page(tmp_path: Path) -> None:
    found = page(tmp_path, RESULTS, [EXAMPLE])
    assert "Is <b>1 < 2</b>?" in found.words and "<think>&amp;</think>" in found.words
    assert not {"think", "script"} & set(found.tags) and found.tags.count("article") == 1
    assert "not in the format" in found.words and "[cut off]" in found.words


def test_figures_intervals_lengths_and_tables_are_shown(tmp_path: Path) -> None:
    words = page(tmp_path, RESULTS, []).words
    for text in ("0.500", "95 % interval 0.000 to 1.000", "0.250", "12.500", "11.000", "20.000", "Level 1", "0.750"):
        assert text in words, text
    assert "Examples" not in words


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    words = page(tmp_path, {"task": "math", "accuracy": 1.0}, []).words
    assert "1.000" in words and "Lengths" not in words and "interval" not in words
