"""A directory belongs to one run: whoever repeats its command goes on, whoever changes what it computes is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, reduce
from pathlib import Path
from typing import Any

import pytest
import yaml

from nla_megatron.config.compose import compose
from nla_megatron.config.run_directory import (
    RECORD,
    check_run_directory,
    claim_run_directory,
    is_done,
    mark_done,
    run_record,
)
from nla_megatron.errors import RunDirectoryError


@cache
def composed(*overrides: str) -> Any:
    return compose("rl", ["out=somewhere", "av=av", "ar=ar", "data=rl.parquet", *overrides])


def rl(out: Path, *overrides: str) -> Any:
    """The configuration of `nla-megatron rl out=OUT OVERRIDES…`."""
    return replace(composed(*overrides), out=str(out))


@pytest.fixture
def claimed(tmp_path: Path) -> Path:
    claim_run_directory("rl", rl(tmp_path / "run", "steps=5"))
    return tmp_path / "run"


def test_the_same_command_resumes(claimed: Path) -> None:
    check_run_directory("rl", rl(claimed, "steps=5"))
    claim_run_directory("rl", rl(claimed, "steps=5"))
    check_run_directory("rl", rl(claimed, "steps=5"))


def test_a_record_that_is_older_than_a_group_of_keys_is_that_of_a_run_without_them(claimed: Path) -> None:
    record = yaml.safe_load((claimed / RECORD).read_text())
    assert record["algorithm"].pop("options") == {}
    (claimed / RECORD).write_text(yaml.safe_dump(record))
    check_run_directory("rl", rl(claimed, "steps=5"))
    with pytest.raises(RunDirectoryError, match="algorithm.options.x"):
        check_run_directory("rl", rl(claimed, "steps=5", "+algorithm.options.x=1"))


def without(record: Path, key: str) -> None:
    """Make a record one of a version that did not have the key, a dotted one."""
    values = yaml.safe_load((record / RECORD).read_text())
    *groups, last = key.split(".")
    reduce(lambda group, name: group[name], groups, values).pop(last)
    (record / RECORD).write_text(yaml.safe_dump(values))


@pytest.mark.parametrize(
    ("key", "changed"),
    [
        ("eval_rows", "eval_rows=3"),
        ("rollout.engine", "rollout.engine=policy"),
        ("rollout.stop", "rollout.stop=[Q]"),
        ("algorithm.value_clip", "algorithm.value_clip=null"),
        ("lora", "lora.rank=4"),
        ("curriculum.layers", "curriculum={layers:[0],steps:2}"),
        ("task", "task=lexical"),
    ],
)
def test_a_key_that_a_record_does_not_have_was_at_its_default(claimed: Path, key: str, changed: str) -> None:
    without(claimed, key)
    check_run_directory("rl", rl(claimed, "steps=5"))
    with pytest.raises(RunDirectoryError, match=rf"holds a run with {key}[^$]*as in this command"):
        check_run_directory("rl", rl(claimed, "steps=5", changed))


def test_a_default_is_that_of_the_group_in_its_command(tmp_path: Path) -> None:
    """Only `eval` samples greedily unasked."""
    told = ["av=av", "ar=ar", "data=rl.parquet", f"out={tmp_path}"]
    claim_run_directory("eval", compose("eval", told))
    without(tmp_path, "rollout")
    check_run_directory("eval", compose("eval", told))
    with pytest.raises(RunDirectoryError, match=r"rollout.temperature=0.0[^$]*rollout.temperature=1.0"):
        check_run_directory("eval", compose("eval", [*told, "rollout.temperature=1"]))


def test_an_option_that_a_task_has_gained_was_as_its_file_says(tmp_path: Path) -> None:
    out, task = tmp_path / "run", ("task=sae", "model=m")
    claim_run_directory("rl", rl(out, *task))
    without(out, "task.options.predictor.layers")
    without(out, "task.options.reference")
    check_run_directory("rl", rl(out, *task))
    with pytest.raises(RunDirectoryError, match=r"task.options.predictor.layers=2[^$]*task.options.predictor.layers=3"):
        check_run_directory("rl", rl(out, *task, "task.options.predictor.layers=3"))
    with pytest.raises(RunDirectoryError, match=r"task.options.other=None[^$]*task.options.other=1"):
        check_run_directory("rl", rl(out, *task, "+task.options.other=1"))


def test_an_option_that_was_taken_away_stays_away(tmp_path: Path) -> None:
    out, task = tmp_path / "run", ("task=sae", "model=m", "~task.options.reference")
    claim_run_directory("rl", rl(out, *task))
    check_run_directory("rl", rl(out, *task))


@pytest.mark.parametrize("key", ["rollout.beams", "beams"])
def test_a_key_that_the_schema_no_longer_has_is_named(claimed: Path, key: str) -> None:
    record = yaml.safe_load((claimed / RECORD).read_text())
    (record["rollout"] if "." in key else record)["beams"] = None
    (claimed / RECORD).write_text(yaml.safe_dump(record))
    with pytest.raises(RunDirectoryError, match=rf"holds a run with {key}\n.*keys and types of `rl` as they are now"):
        check_run_directory("rl", rl(claimed, "steps=5"))


@pytest.mark.parametrize("spelled", ["table/", "./table", "{here}/table", "other/../table", "link"])
def test_a_path_may_be_spelled_in_another_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelled: str) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("table", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("table")
    steered = "{{layer: 0, sae: {}}}"
    told = ("task=sae", "model={}", "task.options.interventions=[" + steered + "]")
    claim_run_directory("rl", rl(Path("run"), *(word.format("table") for word in told)))
    path = spelled.format(here=tmp_path)
    check_run_directory("rl", rl(Path("run"), *(word.format(path) for word in told)))
    for number, key in ((1, "model"), (2, "task.options.interventions")):
        words = [word.format("other" if place == number else path) for place, word in enumerate(told)]
        with pytest.raises(RunDirectoryError, match=rf"holds a run with {key}="):
            check_run_directory("rl", rl(Path("run"), *words))


def test_no_path_is_not_this_directory(tmp_path: Path) -> None:
    claim_run_directory("rl", rl(tmp_path / "run", "task=lexical", "data=''"))
    with pytest.raises(RunDirectoryError, match="data=''"):
        check_run_directory("rl", rl(tmp_path / "run", "task=lexical", "data=."))


def test_texts_that_would_be_spellings_of_one_path_differ_where_there_is_none(tmp_path: Path) -> None:
    claim_run_directory("rl", rl(tmp_path / "run", "rollout.stop=[a/b]"))
    with pytest.raises(RunDirectoryError, match="rollout.stop"):
        check_run_directory("rl", rl(tmp_path / "run", "rollout.stop=[a//b]"))


def test_a_run_may_be_moved(claimed: Path) -> None:
    check_run_directory("rl", rl(claimed.rename(claimed.with_name("moved")), "steps=5"))


@pytest.mark.parametrize(
    ("override", "key", "before", "now"),
    [
        ("steps=6", "steps", "5", "6"),
        ("seed=3", "seed", "0", "3"),
        ("optim.lr=1e-3", "optim.lr", "2e-05", "0.001"),
        ("data=other.parquet", "data", "'rl.parquet'", "'other.parquet'"),
        ("held_out=held.parquet", "held_out", "None", "'held.parquet'"),
        ("rollout.temperature=0.5", "rollout.temperature", "1.0", "0.5"),
    ],
)
def test_another_value_is_refused_with_key_and_both_values(
    claimed: Path, override: str, key: str, before: str, now: str
) -> None:
    with pytest.raises(RunDirectoryError) as caught:
        check_run_directory("rl", rl(claimed, "steps=5", override))
    assert caught.value.found == f"{claimed} holds a run with {key}={before}"
    assert caught.value.expected.startswith(f"{key}={now},")


def test_another_command_is_refused(claimed: Path) -> None:
    config = compose("sft", [f"out={claimed}", "role=av", "model=m", "data=d"])
    with pytest.raises(RunDirectoryError) as caught:
        check_run_directory("sft", config)
    assert "holds a run with" in caught.value.found


@pytest.mark.parametrize(
    "override",
    [
        "parallel=tp2pp2", "parallel.dp=8", "logger=tensorboard", "logger.progress=false", "micro_batch_size=2",
        "save_every=1", "keep_checkpoints=9", "rollout=tp2", "rollout.gpu_memory_utilization=0.5",
        "rollout.record=true", "rollout.max_num_seqs=4", "rollout.max_logprob_gap=0.1",
    ],
)  # fmt: skip
def test_what_does_not_change_the_result_may_change(claimed: Path, override: str) -> None:
    check_run_directory("rl", rl(claimed, "steps=5", override))


def test_another_table_at_the_same_path_is_refused(tmp_path: Path) -> None:
    config = replace(rl(tmp_path / "run"), data=str(tmp_path / "rl.parquet"))
    sidecar = tmp_path / "rl.parquet.nla_meta.yaml"
    sidecar.write_text("dataset_id: monday")
    claim_run_directory("rl", config)
    check_run_directory("rl", config)
    sidecar.write_text("dataset_id: tuesday")
    with pytest.raises(RunDirectoryError, match=r"inputs.data='monday'[^$]*inputs.data='tuesday'"):
        check_run_directory("rl", config)


def test_a_text_that_is_too_long_for_a_path_names_no_table() -> None:
    told = ("input=i", "model=m", "out=o", f"templates.av='{'word ' * 100}<INJECT>'")
    assert run_record("build", compose("build", told))["inputs"] == {}


def test_an_empty_or_absent_directory_is_anybodys(tmp_path: Path) -> None:
    check_run_directory("rl", rl(tmp_path))
    check_run_directory("rl", rl(tmp_path / "new" / "deep"))
    assert list(tmp_path.iterdir()) == []


def test_a_directory_with_foreign_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("twenty years of work")
    with pytest.raises(RunDirectoryError, match="is not empty and no run's directory"):
        check_run_directory("rl", rl(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_place_of_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(RunDirectoryError, match="run is not empty"):
        check_run_directory("rl", rl(tmp_path / "run"))


def test_a_record_that_a_kill_cut_short_does_not_lock_the_directory(tmp_path: Path) -> None:
    (tmp_path / f".{RECORD}.partial").write_text("command: r")
    check_run_directory("rl", rl(tmp_path))
    claim_run_directory("rl", rl(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [RECORD]


def test_the_record_holds_the_whole_configuration(claimed: Path) -> None:
    record = yaml.safe_load((claimed / RECORD).read_text())
    assert (record["command"], record["steps"], record["optim"]["beta2"]) == ("rl", 5, 0.95)
    assert "out" not in record


def test_a_run_is_done_once_marked(claimed: Path) -> None:
    config = rl(claimed, "steps=5")
    assert not is_done(config)
    mark_done(config)
    assert is_done(config)
    check_run_directory("rl", config)
