"""What a stage shows on stderr: a bar at a terminal, one line elsewhere, nothing on the other ranks."""

from __future__ import annotations

import re

import pytest

from nla_megatron.parallel.progress import progress

CLOSING_LINE = r"sft av: 3 steps in \d+\.\d s\n"


def pretend_terminal(monkeypatch: pytest.MonkeyPatch, terminal: bool, ci: str | None) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    monkeypatch.delenv("CI", raising=False)
    if ci is not None:
        monkeypatch.setenv("CI", ci)


@pytest.mark.parametrize(("terminal", "ci"), [(False, None), (True, "true"), (True, "1")])
def test_without_a_terminal_or_in_ci_one_line_closes_the_stage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool, ci: str | None
) -> None:
    pretend_terminal(monkeypatch, terminal, ci)
    with progress("sft av", total=3, active=True) as stage:
        for _ in range(3):
            stage.advance(loss=1.2)
        assert capsys.readouterr().err == ""
    out, err = capsys.readouterr()
    assert re.fullmatch(CLOSING_LINE, err)
    assert out == ""


@pytest.mark.parametrize("ci", [None, "", "false"])
def test_a_terminal_gets_a_bar_with_values_and_no_closing_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ci: str | None
) -> None:
    pretend_terminal(monkeypatch, True, ci)
    with progress("sft av", total=3, active=True) as stage:
        stage.advance(2, loss=1.25)
    out, err = capsys.readouterr()
    assert "2/3" in err and "loss=1.25" in err and "sft av" in err
    assert "steps in" not in err
    assert out == ""


def test_the_option_overrides_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pretend_terminal(monkeypatch, False, "true")
    with progress("sft av", total=3, active=True, bar=True) as stage:
        stage.advance()
    assert "1/3" in capsys.readouterr().err
    pretend_terminal(monkeypatch, True, None)
    with progress("sft av", range(3), active=True, bar=False) as stage:
        assert list(stage) == [0, 1, 2]
    assert re.fullmatch(CLOSING_LINE, capsys.readouterr().err)


@pytest.mark.parametrize("bar", [None, True, False])
def test_the_other_ranks_print_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], bar: bool | None
) -> None:
    pretend_terminal(monkeypatch, True, None)
    assert list(progress("sft av", [1, 2], active=False, bar=bar)) == [1, 2]
    assert capsys.readouterr() == ("", "")


def test_iterating_yields_every_item_and_closes_once(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("sft av", (item for item in "abc"), active=True, bar=False) as stage:
        assert list(stage) == ["a", "b", "c"]
    assert re.fullmatch(CLOSING_LINE, capsys.readouterr().err)


def test_the_length_of_an_iterable_is_the_total_of_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    list(progress("sft av", [1, 2, 3, 4], active=True, bar=True))
    assert "4/4" in capsys.readouterr().err


def test_a_resumed_bar_starts_where_the_run_stood(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("rl", total=400, initial=250, active=True, bar=True) as stage:
        stage.advance()
    assert "251/400" in capsys.readouterr().err


def test_a_stage_that_fails_does_not_claim_its_steps_were_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), progress("rl", total=400, active=True, bar=False) as stage:
        stage.advance()
        raise RuntimeError
    assert capsys.readouterr().err.startswith("rl: stopped after 1 step in ")
    for _ in progress("rl", range(5), active=True, bar=False):
        break
    assert capsys.readouterr().err.startswith("rl: stopped after 0 steps in ")


def test_progress_by_hand_refuses_to_be_iterated() -> None:
    with pytest.raises(TypeError, match="advance"):
        list(progress("rl", total=3, active=False))
