"""Sweeps on a real Slurm of two virtual nodes: arrays, ranks on several nodes, a queue that is left and found again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nla_megatron.errors import ConfigError, RunError
from nla_megatron.launch import sweep
from tests.support import slurm
from tests.support.tiny import tiny_config, tiny_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing())]
TINY = (
    "architecture.hidden_size=32", "architecture.intermediate_size=32", "architecture.head_dim=16",
    "architecture.num_heads=2", "architecture.num_layers=2", "sequence_length=16", "batch_size=2", "micro_batch_size=1",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def nodes() -> Iterator[None]:
    pytest.importorskip("submitit", reason="no submitit: pip install 'nla_megatron[slurm]'")
    with slurm.cluster():
        yield
        slurm.cancel_all()


def on_slurm(*words: str) -> Any:
    return sweep.configured([*words, "sweep.launcher=slurm", "sweep.launcher.minutes=10", "sweep.jobs=2"])


def states(out: Path) -> dict[str, tuple[str, int | None]]:
    jobs = json.loads((out / "sweep.json").read_text())["jobs"]
    return {job["name"]: (job["state"], job["exit_code"]) for job in jobs}


def test_an_array_ends_with_the_exit_code_of_every_job(tmp_path: Path, model_dir: Path) -> None:
    gone, out = tiny_config(tmp_path / "gone"), tmp_path / "out"
    config = on_slurm("plan", f"hf={model_dir},{gone}", f"out={out}")
    sweep.check(config, 1)
    (gone / "config.json").unlink()
    with pytest.raises(RunError, match="1 of 2 jobs failed"):
        sweep.run(config)
    assert list(states(out).values()) == [("done", 0), ("failed", 2)]
    assert slurm.in_queue() == []
    logs = [Path(job["log"]).read_text() for job in json.loads((out / "sweep.json").read_text())["jobs"]]
    assert "copies" in logs[0] or logs[0].strip()
    assert "MissingFile" in logs[1]


@pytest.fixture(scope="module")
def pretrain(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The words of a small training."""
    inputs = tmp_path_factory.mktemp("inputs")
    tiny_tokenizer(inputs / "tokenizer")
    lines = ({"doc_id": f"d{number}", "text": f"the text of document {number} " * 20} for number in range(20))
    (inputs / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ("pretrain", f"corpus={inputs / 'corpus.jsonl'}", f"tokenizer={inputs / 'tokenizer'}", *TINY)


def logged_steps(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.is_file() else []


def wait_for(what: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_warned_job_is_queued_again_and_resumes(tmp_path: Path, pretrain: tuple[str, ...]) -> None:
    """The signal is the one that Slurm sends before a time limit; it reaches every process of the job."""
    out = tmp_path / "out"
    words = (*pretrain, "steps=200", "save_every=1", f"out={out}")
    left = on_slurm(*words, "sweep.launcher.wait=false")
    sweep.check(left, 1)
    sweep.run(left)
    wait_for(lambda: len(logged_steps(out / "000")) > 2)
    (known,) = slurm.in_queue()
    slurm.warn(known)
    wait_for(lambda: slurm.state(known) == "PENDING")
    assert 2 < len(logged_steps(out / "000")) < 200
    slurm.start_now(known)
    sweep.run(on_slurm(*words))
    assert states(out) == {"000": ("done", 0)}
    assert logged_steps(out / "000") == list(range(200))


def test_ranks_on_two_nodes_train_as_one_job(tmp_path: Path, pretrain: tuple[str, ...]) -> None:
    out = tmp_path / "out"
    config = on_slurm(*pretrain, "steps=2", "parallel.dp=2", "seed=0,1", f"out={out}", "sweep.launcher.nodes=2")
    sweep.check(config, 1)
    sweep.run(config)
    assert set(states(out).values()) == {("done", 0)}
    for name in states(out):
        state = json.loads((out / name / "checkpoints" / "step_00000002" / "state.json").read_text())
        assert state["layout"] == "tp 1 pp 1 dp 2"
    submitted = (out / "launcher" / "submitted.json").read_text()
    sweep.run(config)
    assert (out / "launcher" / "submitted.json").read_text() == submitted, "what is finished is not submitted again"


def test_a_queue_that_was_left_is_not_filled_twice(tmp_path: Path, model_dir: Path) -> None:
    words = ("plan", f"hf={model_dir}", "staging_mb=1,2", f"out={tmp_path / 'out'}", "sweep.launcher.wait=false")
    config = on_slurm(*words, "sweep.launcher.options.begin=now+1hour")
    sweep.check(config, 1)
    sweep.run(config)
    queued = slurm.in_queue()
    assert len(queued) == 2 and set(states(tmp_path / "out").values()) == {("queued", None)}
    sweep.run(config)
    assert slurm.in_queue() == queued
    slurm.cancel_all()
    sweep.run(config)
    assert len(slurm.in_queue()) == 2 and not set(slurm.in_queue()) & set(queued)


def test_options_that_sbatch_refuses_are_told(tmp_path: Path, model_dir: Path) -> None:
    words = ("plan", f"hf={model_dir}", "staging_mb=1,2", f"out={tmp_path / 'out'}")
    config = on_slurm(*words, "sweep.launcher.partition=nowhere")
    with pytest.raises(RunError, match="invalid partition"):
        sweep.run(config)


def test_ranks_that_nodes_do_not_share_evenly(tmp_path: Path, model_dir: Path) -> None:
    config = on_slurm("plan", f"hf={model_dir}", f"out={tmp_path / 'out'}", "sweep.launcher.nodes=2")
    with pytest.raises(ConfigError, match="1 ranks on launcher.nodes=2"):
        sweep.check(config, 1)
