"""Texts are taken as they are typed, by the keys that the schema says are text; others are named as they have to be."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from nla_megatron.config.compose import compose
from nla_megatron.config.multirun import axes_of
from nla_megatron.config.schema import SCHEMAS, RlConfig
from nla_megatron.config.typed import texts_quoted, type_of
from nla_megatron.errors import ConfigError

PARSER = OverridesParser.create()
REQUIRED = ["av=av", "ar=ar", "data=data"]
TEXTS = (
    "1e3", "true", "null_", "NULL", "0", "-1", "nan", "runs/ü ö", "中文", "a#b", "#a", "a!b", "it's", "a[0]", "[0]",
    "{b}", "a(1)", "(1)", "a=b", "a,b", "a, b", "x:y", "<gh_stars>", "a\\b", "\\", "a\\'b", '"', "a\"b'c", "%25",
    "a&b;c", "a\tb", "choice(a,b)", "~nobody_by_this_name", "+x", "a b  c", "日本,語=1", "1_000", "0x10", ".", "..",
    "/", "-",
)  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_taken_as_it_was_typed(text: str) -> None:
    for key in ("out", "held_out", "++algorithm.kl"):
        [word] = texts_quoted(RlConfig, [f"{key}={text}"])
        assert str(PARSER.parse_override(word).value()) == text


def test_a_composed_configuration_has_the_texts_as_they_were_typed() -> None:
    config = compose("rl", ["av=1e3", "ar=true", "data=ü b/{c}(1)#'", "out=a,b", "held_out=<x>[0]"])
    assert (config.av, config.ar, config.data, config.out, config.held_out) == (
        "1e3", "true", "ü b/{c}(1)#'", "a,b", "<x>[0]",
    )  # fmt: skip


@pytest.mark.parametrize(("typed", "meant"), [("'a b'", "a b"), ('"a,b"', "a,b"), ("'it\\'s'", "it's"), ("''", "")])
def test_quotes_around_a_whole_text_are_the_grammars(typed: str, meant: str) -> None:
    [word] = texts_quoted(RlConfig, [f"out={typed}"])
    assert str(PARSER.parse_override(word).value()) == meant


def test_null_is_none_where_a_text_may_be_absent_and_interpolations_keep_their_meaning() -> None:
    config = compose("rl", [*REQUIRED, "out=runs/${seed}", "held_out=null", "seed=7"])
    assert (config.out, config.held_out) == ("runs/7", None)


def test_the_home_directory_is_put_in_for_paths_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["out=~/runs/x", "model=~/m", "input=a~/b", "templates.av=~/<INJECT>", "templates.marker=~"]
    config = compose("build", words)
    assert (config.out, config.model, config.input) == (f"{tmp_path}/runs/x", f"{tmp_path}/m", "a~/b")
    assert (config.templates.av, config.templates.marker) == ("~/<INJECT>", "~")


@pytest.mark.parametrize(
    ("typed", "values"),
    [
        ("av=a,b", ["a", "b"]),
        ("av=a(1),b#2,1e3", ["a(1)", "b#2", "1e3"]),
        ("av='a,b',c", ["a,b", "c"]),
        ("av='a,b'", None),
        ("av=choice(a,b)", ["a", "b"]),
        ("dtype=float32,bfloat16", ["float32", "bfloat16"]),
        ("seed=1,2", ["1", "2"]),
    ],
)
def test_of_a_swept_text_commas_outside_quotes_part_the_values(typed: str, values: list[str] | None) -> None:
    key = typed.partition("=")[0]
    fixed, axes = axes_of("rl", [typed])
    if values is None:
        assert (compose("rl", [*REQUIRED[1:], "out=x", *fixed]).av, axes) == ("a,b", [])
        return
    again = texts_quoted(RlConfig, [f"{key}={value}" for value in axes[0].values])
    assert [str(PARSER.parse_override(word).value()) for word in again] == values
    if all(value.isalnum() for value in values):
        assert list(axes[0].values) == values, "as they stand in the records of older sweeps"


def test_a_path_that_is_there_is_one_value_also_for_a_key_that_may_be_anything(tmp_path: Path) -> None:
    """A job's own directory has commas and equals signs in its name; it is given to later commands as it is."""
    path = tmp_path / "000_optim.lr=0.1,seed=0" / "av"
    path.mkdir(parents=True)
    assert axes_of("rl", [f"av={path}"])[1] == []
    config = compose("rl", [*REQUIRED, "out=x", f"+task.options.path={path}"])
    assert config.task.options["path"] == str(path)


def test_quoting_twice_is_quoting_once() -> None:
    for swept in (False, True):
        once = texts_quoted(RlConfig, [f"out={text}" for text in TEXTS if "${" not in text], swept)
        assert texts_quoted(RlConfig, once, swept) == once


@pytest.mark.parametrize(
    ("command", "word", "key"),
    [
        ("rl", "rollout.stop=[</explanation>]", "rollout.stop"),
        ("rl", "rollout.stop=</explanation>", "rollout.stop"),
        ("rl", "+task.options.path=a(1)", "task.options.path"),
        ("rl", "reward=<a>", "reward"),
    ],
)
def test_what_the_grammar_cannot_read_is_shown_in_the_form_that_it_reads(command: str, word: str, key: str) -> None:
    with pytest.raises(ConfigError) as told:
        compose(command, [*REQUIRED, "out=x", word])
    assert "Exception" not in str(told.value) and told.value.found.startswith(word.lstrip("+"))
    [form] = [one for one in shlex.split(told.value.remedy) if one.lstrip("+").startswith(f"{key}=")]
    if key != "reward":
        value: Any = compose(command, [*REQUIRED, "out=x", form])
        for name in key.split("."):
            value = value[name] if isinstance(value, dict) else getattr(value, name)
        assert value == (["</explanation>"] if key == "rollout.stop" else "a(1)")


@pytest.mark.parametrize("word", ["", "steps", "a b", "=3", "--"])
def test_a_word_that_sets_nothing_is_named(word: str) -> None:
    with pytest.raises(ConfigError) as told:
        compose("rl", [*REQUIRED, "out=x", word])
    assert repr(word) in told.value.found or word in told.value.found


@pytest.mark.parametrize("word", ["reward=null", "reward=3", "task=true", "rollout=1.5"])
def test_a_choice_among_files_that_is_no_name_is_named(word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        compose("rl", [*REQUIRED, "out=x", word])


def test_the_schema_says_of_each_command_that_out_is_text() -> None:
    assert {name: type_of(schema, "out") for name, schema in SCHEMAS.items()} == dict.fromkeys(SCHEMAS, str)
