"""Sweeps: every job checked before the first starts, each in its directory, none stopping the others, resumable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from nla_megatron.config.run_directory import mark_done
from nla_megatron.config.schema import LauncherConfig
from nla_megatron.errors import ConfigError, NlaError, RunDirectoryError, RunError
from nla_megatron.launch import sweep
from nla_megatron.launch.commands import execute
from nla_megatron.launch.jobs import Job, Outcome, check_read, last_words, run_alone, run_jobs
from tests.support.hub import cached
from tests.support.tiny import tiny_config, tiny_model


def plan(out: Path, model: Path, *words: str) -> Any:
    """A sweep of the command that costs least."""
    return sweep.configured(["plan", f"hf={model}", f"out={out}", *words])


def rl(out: Path, *words: str) -> Any:
    return sweep.configured(["rl", "av=av", "ar=ar", "data=rl.parquet", f"out={out}", *words])


def names(config: Any) -> list[str]:
    return [one.job.name for one in sweep.planned(config)]


def manifest(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "sweep.json").read_text()))


def refused(config: Any) -> NlaError:
    with pytest.raises(NlaError) as caught:
        sweep.check(config, 1)
    assert not Path(config.out).exists(), "nothing is begun"
    return caught.value


def test_each_job_has_its_directory_and_its_configuration(tmp_path: Path) -> None:
    jobs = sweep.planned(rl(tmp_path / "out", "optim.lr=1e-4,3e-4", "seed=0,1", "steps=7"))
    found = {one.job.name: (one.config.optim.lr, one.config.seed, one.config.steps, one.config.out) for one in jobs}
    assert found == {
        name: (lr, seed, 7, str(tmp_path / "out" / name))
        for name, lr, seed in (
            ("000_optim.lr=0.0001,seed=0", 1e-4, 0),
            ("001_optim.lr=0.0001,seed=1", 1e-4, 1),
            ("002_optim.lr=0.0003,seed=0", 3e-4, 0),
            ("003_optim.lr=0.0003,seed=1", 3e-4, 1),
        )
    }


def test_jobs_are_checked_as_the_command_would_check_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of the hub are paths in its cache, and unknown keys are admitted, before the first job starts."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = tiny_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "soft_landing": 3.5}))
    cached(tmp_path, "some/model", {path.name: path.read_bytes() for path in model.iterdir()})
    (tmp_path / "docs.jsonl").write_text(json.dumps({"doc_id": "a", "text": "word " * 90}) + "\n")

    def extract(*words: str) -> Any:
        source = (f"corpus={tmp_path / 'docs.jsonl'}", f"out={tmp_path / 'out'}", "max_length=64", "seed=0,1")
        return sweep.configured(["extract", *source, *words])

    sweep.check(extract("model=some/model", "allow_unknown_config=[soft_landing]"), 1)
    assert "soft_landing" in refused(extract("model=some/model")).found
    assert "some/other" in refused(extract("model=some/other")).found


def test_the_sweeps_own_keys_are_not_the_commands(tmp_path: Path) -> None:
    config = rl(tmp_path, "seed=0,1", "sweep.jobs=3", "sweep.launcher=slurm", "sweep.launcher.partition=debug")
    assert (config.jobs, config.launcher.name, config.launcher.partition) == (3, "slurm", "debug")
    assert config.overrides == ["av=av", "ar=ar", "data=rl.parquet", "seed=0,1"]


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_multirun_is_another_way_to_say_sweep(tmp_path: Path, model_dir: Path, flag: str) -> None:
    with pytest.raises(ConfigError, match="zero jobs"):
        execute("plan", [f"hf={model_dir}", flag, "rollout_tp=range(0)", f"out={tmp_path}"])


def test_a_pattern_in_out_names_the_directories(tmp_path: Path) -> None:
    config = rl(tmp_path, "seed=3,4", f"out={tmp_path}/runs/lr_${{optim.lr}}_${{seed}}")
    assert Path(config.out) == tmp_path / "runs"
    assert names(config) == ["lr_2e-05_3", "lr_2e-05_4"]


def test_a_sweep_that_grows_keeps_the_directories_it_has(tmp_path: Path, model_dir: Path) -> None:
    (tmp_path / "out").mkdir()
    first = rl(tmp_path / "out", "steps=1,2", "seed=0,1")
    jobs = sweep.planned(first)
    sweep._write_manifest(first, jobs, {one.job.name: sweep._standing(one, None) for one in jobs})
    grown = names(rl(tmp_path / "out", "steps=1,2", "seed=0,1,2"))
    assert grown == [
        "000_steps=1,seed=0", "001_steps=1,seed=1", "004_steps=1,seed=2",
        "002_steps=2,seed=0", "003_steps=2,seed=1", "005_steps=2,seed=2",
    ]  # fmt: skip


def test_an_unknown_key(tmp_path: Path) -> None:
    error = refused(rl(tmp_path / "out", "optim.lrr=1,2"))
    assert isinstance(error, ConfigError) and "did you mean optim.lr?" in error.remedy


def test_a_value_out_of_range_in_the_last_job_stops_before_the_first(tmp_path: Path) -> None:
    assert "steps=0" in refused(rl(tmp_path / "out", "steps=2,1,0")).found


def test_what_a_command_checks_is_checked_for_every_job(tmp_path: Path, model_dir: Path) -> None:
    error = refused(plan(tmp_path / "out", model_dir, "staging_mb=1,2", "rollout_tp=1,7"))
    assert "001_staging_mb=1,rollout_tp=7" in error.found


def test_two_jobs_with_the_same_directory(tmp_path: Path) -> None:
    error = refused(rl(tmp_path / "out", "steps=1,2", "seed=0,1", f"out={tmp_path / 'out'}/${{seed}}"))
    assert isinstance(error, ConfigError)
    assert "two jobs with the directory" in error.found and "steps=1, seed=0; steps=2, seed=0" in error.found


def test_two_jobs_that_are_the_same_run(tmp_path: Path) -> None:
    error = refused(rl(tmp_path / "out", "optim.lr=1e-4,0.0001"))
    assert "two jobs that are the same run" in error.found


def test_a_word_that_some_job_reads_is_the_others_too(tmp_path: Path) -> None:
    words = ("algorithm=grpo,ppo", "critic_optim.lr=1e-3", "algorithm.normalise_std=false")
    for typed in (words, ("algorithm.kl=k2,k3", "algorithm.kl_coef=0,0.1")):
        check_read("rl", [(one.config, one.job.argv[1:]) for one in sweep.planned(rl(tmp_path / "out", *typed))])


def test_a_word_that_no_job_reads_is_named(tmp_path: Path) -> None:
    jobs = sweep.planned(rl(tmp_path / "out", "algorithm=grpo,rloo", "critic_optim.lr=1e-3"))
    with pytest.raises(ConfigError, match=r"critic_optim\.lr=0\.001 with algorithm\.name=grpo"):
        check_read("rl", [(one.config, one.job.argv[1:]) for one in jobs])


def test_a_job_and_its_rank_take_a_word_that_is_another_jobs(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    words = ("convert", "import", f"hf={model}", f"out={tmp_path / 'imported'}", "text=words to verify by")
    with pytest.raises(ConfigError, match="text='words to verify by' in convert import"):
        execute("convert", [*words[1:], "parallel.dp=1"])
    outcomes: list[Outcome] = []
    run_jobs([Job("one", words, 1, tmp_path / "log")], 1, LauncherConfig(), outcomes.append, tmp_path)
    assert [outcome.state for outcome in outcomes] == ["done"], (tmp_path / "log").read_text()


@pytest.mark.parametrize("typed", ["seed=range(0)", "seed=range(5,2)"])
def test_zero_jobs(tmp_path: Path, typed: str) -> None:
    assert "zero jobs" in refused(rl(tmp_path / "out", typed)).found


@pytest.mark.parametrize("command", ["sweep", "dance"])
def test_a_command_that_cannot_be_repeated(tmp_path: Path, command: str) -> None:
    config = sweep.configured([command, "seed=0,1", f"out={tmp_path / 'out'}"])
    assert f"a sweep of {command!r}" in refused(config).found


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no value for out"):
        sweep.configured(["rl", "seed=0,1"])


def test_a_directory_of_something_else(tmp_path: Path, model_dir: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(RunDirectoryError, match="no sweep's directory"):
        sweep.check(plan(tmp_path, model_dir, "staging_mb=1,2"), 1)


def test_a_sweep_of_another_command(tmp_path: Path, model_dir: Path) -> None:
    config = plan(tmp_path / "out", model_dir, "staging_mb=1,2")
    sweep._write_manifest(config, [], {})
    with pytest.raises(RunDirectoryError, match="holds a sweep of plan"):
        sweep.check(rl(tmp_path / "out", "seed=0,1"), 1)


def test_a_sweep_is_nobodys_rank(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one of 2 ranks" in refused(plan(tmp_path / "out", model_dir, "staging_mb=1,2")).found


def test_slurm_without_submitit_or_sbatch_is_named(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    error = refused(plan(tmp_path / "out", model_dir, "staging_mb=1,2", "sweep.launcher=slurm"))
    assert "submitit" in error.found or "`sbatch`" in error.found


def test_more_ranks_than_gpus(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    error = refused(plan(tmp_path / "out", model_dir, "staging_mb=1,2", "sweep.jobs=2"))
    assert "on 1 GPUs" in error.found and "at most 1 at a time" in error.expected


def test_finished_jobs_are_not_run_again(tmp_path: Path) -> None:
    config = rl(tmp_path / "out", "seed=0,1")
    for one in sweep.planned(config):
        Path(one.config.out).mkdir(parents=True)
        mark_done(one.config)
    (tmp_path / "out" / "sweep.json").write_text(json.dumps({"command": "rl", "jobs": []}))
    sweep.check(config, 1)  # it would refuse their missing models
    sweep.run(config)
    assert {job["state"] for job in manifest(tmp_path / "out")["jobs"]} == {"done"}


def test_a_failed_job_does_not_stop_the_others(
    tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first job's model is there when all are checked and gone when it is run."""
    gone = tmp_config(tmp_path)
    out = tmp_path / "out"
    config = sweep.configured(["plan", f"hf={gone},{model_dir}", "staging_mb=1,2", f"out={out}", "sweep.jobs=2"])
    sweep.check(config, 1)
    (gone / "config.json").unlink()
    with pytest.raises(RunError) as caught:
        sweep.run(config)
    assert caught.value.exit_code == 1 and "2 of 4 jobs failed" in caught.value.found
    jobs = manifest(out)["jobs"]
    assert [job["state"] for job in jobs] == ["failed", "failed", "done", "done"]
    assert [job["exit_code"] for job in jobs] == [2, 2, 0, 0]
    table = capsys.readouterr().out
    assert table.count("MissingFile: ") == 2 and "2 done, 2 failed" in table
    assert all(Path(job["log"]).read_text() for job in jobs)


def tmp_config(tmp_path: Path) -> Path:
    return tiny_config(tmp_path / "gone")


def test_last_words_are_the_error_and_not_its_remedy(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("step 3\nMissingFile: no x\n  expected: an x\n  to do:    make one\n\n")
    assert last_words(log) == "MissingFile: no x"
    log.write_text("something\nKilled\n")
    assert last_words(log) == "Killed"
    assert last_words(tmp_path / "none") == ""


def test_a_job_is_a_command_line() -> None:
    job = Job("name", ("plan", "hf=/nowhere"), 1, Path("log"))
    assert run_alone(job.argv) == 2
