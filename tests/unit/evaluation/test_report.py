"""The report page: what is in the files is on the page, nothing else is fetched, and nothing on it can act."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nla_megatron.errors import MissingFile, RunDirectoryError
from nla_megatron.evaluation.report import write_report

HOSTILE = '</p><script src="http://evil.example/x.js">alert(1)</script><img src=x onerror=\'a()\'> &amp; "quoted"'
SUMMARY: dict[str, Any] = {
    "fve_sft": 0.42137,
    "fve_rl": 0.65871,
    "fve_rl_ci95": [0.64312, 0.67384],
    "fve_rl_in_sample": 0.63127,
    "fve_baseline": "training_rows",
    "fve_baseline_rows": 12345,
    "fve_gold_text": 0.44783,
    "fve_shuffled": -0.31214,
    "fve_frozen_ar": 0.51378,
    "fve_frozen_ar_ci95": [0.49126, 0.53417],
    "fve_text_only": 0.23456,
    "fve_gain_ci95": [0.22123, 0.25362],
    "steps": 400,
    "world": {"tp": 2, "pp": 3, "dp": 4, "rollout_tp": 8},
    "seconds": {"extract": 42.25, "sft_av": 1830.5, "rl": 9520.75, "total": 11393.5},
    "logprob_gap_max": 0.0312,
    "injected": 819200,
    "expected_injections": 819200,
    "model": "some/model <7b>",
    "extra_list": [1, 2],
}
VOID = {"meta", "br"}


class Page(HTMLParser):
    """Fails on tags that do not close in order; collects the text, the attributes and the exact values."""

    def __init__(self, path: Path):
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.values: list[float] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "data":
            self.values.append(float(dict(attrs)["value"] or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] != "style":
            self.text += data


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rl_row(step: int) -> dict[str, Any]:
    names = "reward kl entropy response_length truncated extraction_failed logprob_gap"
    names += " policy_loss policy_grad_norm ar_loss"
    row: dict[str, Any] = {name: 0.1 * step for name in names.split()}
    row |= {"step": step, "ar_grad_norm": 1.0, "batch_fve": 0.5}
    row |= {f"seconds_{phase}": 1.5 for phase in ("generate", "score", "look", "policy", "learn", "reload")}
    return row | ({"eval_fve": 0.6} if step % 5 == 0 else {})


def example(index: int, **changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "doc_id": f"corpus:test:{index}",
        "context": "one two three four five six seven eight",
        "gold": "GOLD",
    }
    row |= {"explanation": f"text {index}.", "cosine": 0.7251, "cosine_shuffled": 0.1149, "failed": False}
    return row | changes


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "my-run"
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    return folder


def complete(folder: Path) -> None:
    write_lines(folder / "rl" / "metrics.jsonl", [rl_row(step) for step in range(1, 21)])
    for stage in ("sft_av", "sft_ar", "pretrain"):
        write_lines(folder / stage / "metrics.jsonl", [{"step": s, "loss": 1 / s, "lr": 1e-5} for s in range(1, 11)])
    write_lines(folder / "eval" / "examples.jsonl", [example(index) for index in range(25)])


def report(folder: Path) -> Page:
    out = folder.parent / "out" / "report.html"
    write_report(folder, out)
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]
    return Page(out)


def test_a_complete_run_is_one_well_formed_page_that_fetches_nothing(run_dir: Path) -> None:
    complete(run_dir)
    page = report(run_dir)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert not {"src", "href", "srcset", "action"} & {name for name, _ in page.attributes}
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert not any(mark in page.source for mark in ("http://", "https://", "url(", "@import"))
    assert page.tags.count("svg") == 9 + 1 + 3
    assert page.tags.count("article") == 20
    assert "The first 20 of 25" in page.text


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, "predicting the mean activation of the 12,345 training rows."),
        (
            {"fve_baseline": "evaluated_rows", "fve_baseline_rows": 400},
            "predicting the mean activation of the 400 evaluated rows themselves, since the table does not know",
        ),
        ({"fve_baseline": None, "fve_baseline_rows": None}, "predicting the mean activation of the evaluated rows."),
    ],
)
def test_the_page_says_what_an_fve_is_a_fraction_of(run_dir: Path, changed: dict[str, Any], said: str) -> None:
    write_lines(run_dir / "rl" / "metrics.jsonl", [rl_row(step) for step in range(1, 21)])
    (run_dir / "summary.json").write_text(json.dumps(SUMMARY | changed))
    page = report(run_dir)
    assert said in page.text and f"0 {said.removeprefix('predicting ')}" in page.text
    assert "0.631 against the mean of the evaluated rows (in-sample)" in page.text


def test_the_numbers_on_the_page_are_the_numbers_of_the_summary(run_dir: Path) -> None:
    page = report(run_dir)
    left_to_words = ("fve_baseline_rows",)
    singles = [value for key, value in SUMMARY.items() if isinstance(value, int | float) and key not in left_to_words]
    inside = [v for key in ("fve_rl_ci95", "fve_gain_ci95") for v in SUMMARY[key]]
    inside += [v for key in ("world", "seconds") for name, v in SUMMARY[key].items() if name != "total"]
    assert set(page.values) >= set(singles + inside)
    for text in (
        "0.659",
        "0.643 to 0.674",
        "0.421",
        "0.448",
        "−0.312",
        "0 by definition",
        "+0.237",
        "+0.221 to +0.254",
    ):
        assert text in page.text
    for text in (
        "819,200 of 819,200",
        "0.0312",
        "42.2 s",
        "31 min",
        "2 h 39 min",
        "3 h 10 min in all",
        "some/model <7b>",
        "1, 2",
        "my-run",
    ):
        assert text in page.text


def test_the_total_is_no_stage(run_dir: Path) -> None:
    page = report(run_dir)
    assert SUMMARY["seconds"]["total"] not in page.values


def test_charts_hold_every_value_of_the_metrics(run_dir: Path) -> None:
    complete(run_dir)
    page = report(run_dir)
    # held out 4, one series per chart 20 each, two series in the two charts of shares and norms, three losses of 10
    assert page.tags.count("circle") == 4 + 20 * (1 + 4 + 2 + 1 + 1 + 2) + 30
    assert page.tags.count("rect") == 6 * 20


def test_missing_optional_files_leave_out_their_sections(run_dir: Path) -> None:
    page = report(run_dir)
    for heading in ("Reinforcement learning", "Before RL", "Examples"):
        assert heading not in page.text
    assert "svg" not in page.tags
    complete(run_dir)
    for heading in ("Reinforcement learning", "Before RL", "Examples"):
        assert heading in report(run_dir).text


@pytest.mark.parametrize("field", ["doc_id", "context", "explanation", "gold"])
def test_text_that_looks_like_markup_is_shown_and_does_nothing(run_dir: Path, field: str) -> None:
    (run_dir / "summary.json").write_text(json.dumps(SUMMARY | {"run_name": HOSTILE, "note<b>": HOSTILE}))
    write_lines(run_dir / "eval" / "examples.jsonl", [example(1, **{field: HOSTILE})])
    page = report(run_dir)
    assert not {"script", "img", "b<"} & set(page.tags)
    assert page.text.count(HOSTILE) >= 3 + 1  # the page's title, its heading, the extra key, the example


def test_the_last_words_of_the_context_are_marked_and_a_long_one_is_cut(run_dir: Path) -> None:
    words = [f"w{index}" for index in range(500)]
    write_lines(
        run_dir / "eval" / "examples.jsonl", [example(1), example(2, context=" ".join(words)), example(3, context="")]
    )
    page = report(run_dir)
    assert "<mark>three four five six seven eight</mark>" in page.source
    assert f"<mark>{' '.join(words[-6:])}</mark>" in page.source
    assert "w430 w431" in page.text and "w429" not in page.text


def test_a_failed_explanation_is_named(run_dir: Path) -> None:
    row = example(1, failed=True, explanation=None, cosine=None)
    write_lines(run_dir / "eval" / "examples.jsonl", [row])
    page = report(run_dir)
    assert "No explanation could be extracted." in page.text
    assert "cosine not measured" in page.text


def test_lost_injections_stand_out(run_dir: Path) -> None:
    assert 'class="bad"' not in report(run_dir).source
    (run_dir / "summary.json").write_text(json.dumps(SUMMARY | {"injected": 819199}))
    assert '<span class="bad"><data value="819199">819,199</data> of' in report(run_dir).source


def test_a_gain_whose_interval_holds_zero_is_not_sold_as_one(run_dir: Path) -> None:
    assert "includes zero" not in report(run_dir).text
    (run_dir / "summary.json").write_text(json.dumps(SUMMARY | {"fve_gain_ci95": [-0.01, 0.25]}))
    assert "includes zero" in report(run_dir).text


def test_a_run_that_ended_after_sft_reports_what_it_has(run_dir: Path) -> None:
    (run_dir / "summary.json").write_text('{"fve_sft": 0.4, "fve_rl": NaN, "seconds": {}, "world": {"tp": 1}}')
    page = report(run_dir)
    assert "held-out FVE after SFT" in page.text
    assert "not measured" in page.text
    assert "nan" not in page.text.lower()


def test_a_line_torn_by_a_kill_is_left_out_and_a_last_line_without_newline_is_not(run_dir: Path) -> None:
    for end, circles in (('{"step": 3, "loss": 3}', 3), ('{"step": 3, "lo', 2), ("", 2)):
        path = run_dir / "sft_av" / "metrics.jsonl"
        write_lines(path, [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}])
        path.write_text(path.read_text() + end)
        assert report(run_dir).tags.count("circle") == circles


def test_null_in_the_metrics_is_a_gap(run_dir: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": None, "nonfinite": ["loss"]},
        {"step": 3, "loss": 1.0},
    ]
    write_lines(run_dir / "sft_av" / "metrics.jsonl", rows)
    assert report(run_dir).tags.count("circle") == 2


def test_a_missing_summary_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="summary.json"):
        write_report(tmp_path, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["summary.json", "rl/metrics.jsonl"])
def test_a_file_that_is_not_json_is_named(run_dir: Path, name: str) -> None:
    (run_dir / "rl").mkdir()
    (run_dir / name).write_text("step,loss\n1,2\n")
    with pytest.raises(RunDirectoryError, match=name):
        write_report(run_dir, run_dir / "report.html")
