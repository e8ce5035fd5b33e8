"""Rubrics and the source match over an evaluation's examples, asked of a real server on this machine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nla_megatron.config.compose import compose
from nla_megatron.config.schema import JudgeConfig
from nla_megatron.errors import ConfigError, MissingFile, NlaError, ProviderError, RunDirectoryError
from nla_megatron.evaluation import judges
from nla_megatron.evaluation.judges import candidates
from nla_megatron.launch.commands import run as command
from tests.support.messages_server import MessagesServer, Received, Reply, within

N = 8
"""Rows; two of each document."""


@pytest.fixture(autouse=True)
def api_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("ANTHROPIC_BASE_URL", "ANTHROPIC_CUSTOM_HEADERS"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in (("NO_PROXY", "127.0.0.1"), ("no_proxy", "127.0.0.1"), ("ANTHROPIC_API_KEY", "test-key")):
        monkeypatch.setenv(variable, value)


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    """Row 0 has no explanation; that of row i says i, its source says i as well."""
    directory = tmp_path / "eval"
    directory.mkdir()
    lines = [
        {
            "doc_id": f"d{row // 2}", "context": f"source {row}.",
            "explanation": f"about {row}." if row else None, "gold": f"gold of {row}.",
        }
        for row in range(N)
    ]  # fmt: skip
    (directory / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "done").write_text("")
    return directory


def judged(evaluation: Path, server: MessagesServer, *overrides: str) -> dict[str, Any]:
    config = configured(evaluation, f"+endpoint.base_url={server.base_url}", "+endpoint.backoff=0.01", *overrides)
    judges.check(config, 1)
    within(60, lambda: judges.run(config) or True)
    found: dict[str, Any] = json.loads((Path(config.out) / "judge.json").read_text())
    return found


def configured(evaluation: Path, *overrides: str) -> JudgeConfig:
    out = evaluation.parent / "judge"
    config: JudgeConfig = compose("judge", [f"evaluation={evaluation}", f"out={out}", *overrides])
    return config


def number(text: str) -> int:
    [found] = re.findall(r"<text>\n\D*(\d+)\.\n</text>", text)
    return int(found)


def reader(score: Callable[[str, int], int]) -> Callable[[Received], Reply]:
    """Scores by rubric and row, and finds the passage that has the text's number."""

    def behaviour(request: Received) -> Reply:
        row = number(request.user)
        [place] = re.findall(rf"<passage_(\d)>\nsource {row}\.", request.user) or [None]
        rubric = request.body["system"].split("\n")[0]
        return Reply(f"So <score>{place or score(rubric, row)}</score>")

    return behaviour


TWO = ("rubrics={depth: How deep.,charm: How charming.}",)
"""Of the shipped five only the names are left out: Hydra merges them."""


def test_means_of_each_rubric_and_the_match_by_hand(evaluation: Path) -> None:
    """Row i gets i of 10 for accuracy, 5 for the rest; the row without an explanation the worst score and no match."""
    with MessagesServer(reader(lambda rubric, row: max(row, 1) if rubric.startswith("All that") else 5)) as server:
        found = judged(evaluation, server)
    explanation, gold = found["explanation"], found["gold"]
    assert explanation["accuracy"] == gold["accuracy"] == (1 + 1 + 2 + 3 + 4 + 5 + 6 + 7) / 8
    assert explanation["clarity"] == (1 + 7 * 5) / 8 and gold["clarity"] == 5
    assert explanation["source_match"] == 7 / 8 and gold["source_match"] == 1 and found["source_match_chance"] == 0.25
    assert (explanation["absent"], gold["absent"], found["rows"], found["documents"]) == (1, 0, 8, 4)
    low, high = explanation["accuracy_ci95"]
    assert low < explanation["accuracy"] < high
    assert {"specificity", "coverage", "brevity"} < set(gold)
    # 5 rubrics and the match, of 15 texts: the one that is absent costs no request.
    assert len(server.received) == 6 * 15


def test_the_judge_sees_rubric_text_and_source(evaluation: Path) -> None:
    with MessagesServer(reader(lambda *_: 5)) as server:
        judged(evaluation, server, *TWO, "texts=[gold]")
    asked = {request.body["system"].split("\n")[0]: request for request in server.received}
    assert {"How deep.", "How charming."} < set(asked)
    assert "from 1 to 10" in asked["How deep."].body["system"]
    shown = asked["How deep."].user
    assert shown == f"<text>\ngold of {number(shown)}.\n</text>\n<reference>\nsource {number(shown)}.\n</reference>"


def test_candidates_are_the_row_and_rows_of_other_documents() -> None:
    documents = ["a", "a", "b", "c", "c", "d", "e"]
    drawn = candidates(documents, 4, seed=3)
    for row, shown in enumerate(drawn):
        assert row in shown and len({documents[one] for one in shown}) == 4
    assert drawn == candidates(documents, 4, seed=3) != candidates(documents, 4, seed=4)
    places = [shown.index(row) for seed in range(60) for row, shown in enumerate(candidates(documents, 4, seed))]
    assert all(places.count(place) > len(places) / 8 for place in range(4))


def test_a_judge_that_always_points_at_one_place_is_right_by_chance(evaluation: Path) -> None:
    with MessagesServer(lambda _: Reply("<score>1</score>")) as server:
        found = judged(evaluation, server, "texts=[gold]")
    documents = [f"d{row // 2}" for row in range(N)]
    right = [shown[0] == row for row, shown in enumerate(candidates(documents, 4, 0))]
    assert found["gold"]["source_match"] == sum(right) / N < 1


def test_failed_judgements_are_counted_and_no_part_of_a_mean(evaluation: Path) -> None:
    def behaviour(request: Received) -> Reply:
        return Reply("I would rather not" if number(request.user) == 3 else "<score>4</score>")

    with MessagesServer(behaviour) as server:
        found = judged(evaluation, server, "texts=[gold]")
    assert found["gold"]["clarity"] == 4 and found["gold"]["clarity_failed"] == 1
    rows = [json.loads(line) for line in (evaluation.parent / "judge" / "rows.jsonl").read_text().splitlines()]
    assert [row["gold"]["clarity"] for row in rows] == [4, 4, 4, None, 4, 4, 4, 4]


def test_what_was_judged_before_it_was_stopped_is_not_asked_again(
    evaluation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(request: Received) -> Reply:
        return Reply("no credit", status=402) if "charming" in request.body["system"] else Reply("<score>4</score>")

    with MessagesServer(refusing) as server, pytest.raises(ProviderError, match="402"):
        monkeypatch.setenv("ANTHROPIC_BASE_URL", server.base_url)
        within(60, lambda: judges.run(configured(evaluation, *TWO, "texts=[gold]")) or True)
    before = sum("deep" in request.body["system"] for request in server.received)
    assert before == N and not (evaluation.parent / "judge" / "done").exists()
    # The same command, but for the server, whose address is another one now.
    config = configured(evaluation, *TWO, "texts=[gold]")
    with MessagesServer(reader(lambda *_: 4)) as again:
        monkeypatch.setenv("ANTHROPIC_BASE_URL", again.base_url)
        judges.check(config, 1)
        within(60, lambda: judges.run(config) or True)
    assert not any("deep" in request.body["system"] for request in again.received) and len(again.received) > 0


def test_the_command_prints_its_figures(evaluation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MessagesServer(reader(lambda *_: 5)) as server:
        told = [
            f"evaluation={evaluation}",
            f"out={evaluation.parent / 'judge'}",
            f"+endpoint.base_url={server.base_url}",
        ]
        assert within(60, lambda: command(["judge", *told]) + 1) == 1
    printed = capsys.readouterr().out
    assert re.search(r"clarity +4\.50 \[[\d.]+, [\d.]+\] +5\.00 \[5\.00, 5\.00\]", printed)
    assert re.search(r"absent +1 +0", printed)


@pytest.mark.parametrize(
    ("override", "kind", "found"),
    [
        ("evaluation=nowhere", MissingFile, "no finished evaluation in nowhere"),
        ("texts=[explanation,silver]", ConfigError, "no text silver"),
        ("candidates=5", ConfigError, "examples of 4 documents"),
        ("candidates=1", ConfigError, "candidates=1"),
        ("low=10", ConfigError, "low=10 with high=10"),
        ("+rubrics.empty=' '", ConfigError, "empty"),
        ("+rubrics.source_match=good", ConfigError, "source_match"),
        ("+rubrics.absent=good", ConfigError, "absent"),
        ("+rubrics.clarity_failed=good", ConfigError, "clarity_failed"),
        ("texts=[gold,gold]", ConfigError, "each text once"),
        ("texts=[]", ConfigError, "each text once"),
        ("texts=[doc_id]", ConfigError, "no text doc_id"),
        ("+endpoint.max_failures=2", ConfigError, "max_failures=2"),
        ("+endpoint.modell=x", ConfigError, "endpoint.modell"),
    ],
)
def test_what_cannot_be_judged_is_named_before_anything_is_asked(
    evaluation: Path, override: str, kind: type[NlaError], found: str
) -> None:
    with MessagesServer(lambda _: Reply("<score>1</score>")) as server, pytest.raises(kind, match=found):
        judges.check(configured(evaluation, f"+endpoint.base_url={server.base_url}", override), 1)
    assert not server.received and not (evaluation.parent / "judge").exists()


GOOD = {"doc_id": "d", "context": "c", "explanation": "e", "gold": "g"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "no example"),
        (json.dumps({"prompt": "1+1", "response": "2"}), "no text context, doc_id"),
        (json.dumps(GOOD) + "\n" + json.dumps(GOOD | {"context": None}), "example 1 .* no text context"),
        (json.dumps(GOOD | {"gold": 0.5}), "no text gold"),
        ("[1]", "line 1 of .* is '.1.'"),
        ('{"doc_id": "d', "line 1 of .* is "),
    ],
)
def test_examples_that_are_none_of_explanations_are_named(evaluation: Path, text: str, found: str) -> None:
    (evaluation / "examples.jsonl").write_text(text + "\n" if text else "")
    with pytest.raises((ConfigError, RunDirectoryError), match=found):
        judges.check(configured(evaluation), 1)


def test_judgements_of_examples_that_were_replaced_are_no_longer_this_run_s(
    evaluation: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with MessagesServer(reader(lambda *_: 5)) as server:
        judged(evaluation, server)
        server_told = f"+endpoint.base_url={server.base_url}"
        config = configured(evaluation, server_told, "+endpoint.backoff=0.01")
        capsys.readouterr()
        judges.finished(config)
        assert "clarity" in capsys.readouterr().out
        lines = (evaluation / "examples.jsonl").read_text()
        (evaluation / "examples.jsonl").write_text(lines.replace("about 3", "about 30"))
        with pytest.raises(RunDirectoryError, match="other examples"):
            judges.finished(config)


def test_intervals_come_from_whole_documents(evaluation: Path) -> None:
    """Rows of a document score alike: by hand Student's interval of four means, of which none is below the scale."""
    with MessagesServer(reader(lambda _, row: 1 + row // 2)) as server:
        found = judged(evaluation, server, "texts=[gold]")["gold"]["clarity_ci95"]
    half = 3.182446 * np.std([1, 2, 3, 4], ddof=1) / 2
    assert found == pytest.approx([1.0, 2.5 + half])


def test_a_run_may_be_more_patient_when_it_goes_on(evaluation: Path) -> None:
    with MessagesServer(reader(lambda *_: 5)) as server:
        judged(evaluation, server, "texts=[gold]")
        judges.check(configured(evaluation, f"+endpoint.base_url={server.base_url}", "texts=[gold]",
                                "+endpoint.concurrency=2", "+endpoint.max_failures=0.5"), 1)  # fmt: skip
        with pytest.raises(RunDirectoryError, match="endpoint.model"):
            judges.check(configured(evaluation, "texts=[gold]", "+endpoint.model=another"), 1)


def test_a_slash_behind_the_evaluation_makes_no_other_run(evaluation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(evaluation.parent)
    with MessagesServer(reader(lambda *_: 5)) as server:
        judged(evaluation, server)
        for spelled in (f"{evaluation}/", evaluation.name, f"./{evaluation.name}/."):
            judges.check(configured(evaluation, f"+endpoint.base_url={server.base_url}", "+endpoint.backoff=0.01",
                                    f"evaluation={spelled}"), 1)  # fmt: skip


def test_a_missing_key_is_named(evaluation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    with pytest.raises(ConfigError, match="no ANTHROPIC_API_KEY"):
        judges.check(configured(evaluation), 1)
