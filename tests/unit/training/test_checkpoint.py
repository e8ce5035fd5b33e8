"""A checkpoint is used if all of it is there: else the one before, said loudly, or none."""

from __future__ import annotations

import json
import multiprocessing
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from nla_megatron.errors import CheckpointError, DiskFull
from nla_megatron.parallel.world import World
from nla_megatron.training.checkpoint import Checkpoints

MANIFEST = "files.json"


class Number:
    """A module whose whole state is one tensor, saved as megatron-core saves weights."""

    def __init__(self, value: float, width: int = 64):
        self.values = torch.full((width,), value)

    def state(self, loading: bool) -> dict[str, Any]:
        from megatron.core.dist_checkpointing import ShardedTensor

        return {"values": ShardedTensor.from_rank_offsets("values", self.values, replica_id=0)}

    def load_state(self, loaded: dict[str, Any]) -> None:
        self.values = loaded["values"]


def saved(out: Path, world: World, *steps: int, keep: int = 9, keep_every: int = 0) -> Checkpoints:
    """The checkpoints of a run in which the number is the step."""
    checkpoints = Checkpoints(out, "sft", world, keep, keep_every)
    for step in steps:
        checkpoints.save(step, {"av": Number(step)}, {}, {})
    return checkpoints


def resumed(checkpoints: Checkpoints) -> tuple[int, float]:
    number = Number(-1.0)
    step = checkpoints.resume({"av": number}, {}, {})
    return step, float(number.values[0])


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def weights(step: Path) -> Path:
    return max(step.glob("av/*.distcp"), key=lambda path: path.stat().st_size)


TEARS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an empty state": (lambda step: (step / "state.json").write_bytes(b""), "state.json"),
    "half the weights": (lambda step: halve(weights(step)), ".distcp"),
    "no weights": (lambda step: weights(step).unlink(), ".distcp"),
    "an empty generator": (lambda step: (step / "rng.pt").write_bytes(b""), "rng.pt"),
    "no table of weights": (lambda step: (step / "av" / ".metadata").unlink(), "av"),
    "an empty table of weights": (lambda step: (step / "av" / ".metadata").write_bytes(b""), ".metadata"),
    "no common part": (lambda step: (step / "av" / "common.pt").unlink(), "common.pt"),
    "no module": (lambda step: shutil.rmtree(step / "av"), "av"),
}
WITH_MANIFEST: dict[str, tuple[Callable[[Path], Any], str]] = {
    "one bit of the weights": (lambda step: flip(weights(step)), "other bytes"),
    "one bit of the generator": (lambda step: flip(step / "rng.pt"), "other bytes"),
    "half the manifest": (lambda step: halve(step / MANIFEST), MANIFEST),
    "no state": (lambda step: (step / "state.json").unlink(), "state.json"),
}
CASES = [(tear, True) for tear in (*TEARS, *WITH_MANIFEST)] + [(tear, False) for tear in TEARS]


@pytest.mark.parametrize(("tear", "manifest"), CASES)
def test_of_a_torn_checkpoint_the_one_before_is_used_and_both_are_named(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str], tear: str, manifest: bool
) -> None:
    checkpoints = saved(tmp_path, world, 2, 4)
    before, newest = (tmp_path / "checkpoints" / f"step_{step:08d}" for step in (2, 4))
    for step in () if manifest else (before, newest):
        (step / MANIFEST).unlink()
    damage, told = {**TEARS, **WITH_MANIFEST}[tear]
    damage(newest)
    assert resumed(checkpoints) == (2, 2.0)
    said = capfd.readouterr().err
    assert f"WARNING: the checkpoint {newest} is not whole" in said and told in said and str(before) in said
    checkpoints.save(4, {"av": Number(44.0)}, {}, {})
    assert resumed(checkpoints) == (4, 44.0) and capfd.readouterr().err.count("WARNING") == 0


class Remembered:
    """A memory of one number."""

    def state(self) -> dict[str, float]:
        return {"mean": 1.0}

    def load_state(self, state: dict[str, float]) -> None:
        raise AssertionError("what does not fit is refused before anything is loaded")


def test_a_checkpoint_of_another_run_is_refused_before_anything_is_loaded(world: World, tmp_path: Path) -> None:
    number, memory = Number(-1.0), Remembered()
    saved(tmp_path, world, 2)
    for stage, modules, expected, memories, said in (
        ("rl", ("av",), {}, {}, "stage='sft'.*\n.*stage='rl'"),
        ("sft", ("av", "ar"), {}, {}, r"modules=\['av'\]"),
        ("sft", ("av",), {"schedule": 7}, {}, "schedule=None"),
        ("sft", ("av",), {}, {"reward": memory}, r"memory=\[\]"),
    ):
        with pytest.raises(CheckpointError, match=said):
            Checkpoints(tmp_path, stage, world, 9).resume(dict.fromkeys(modules, number), expected, memories)
        assert float(number.values[0]) == -1.0, said


def test_where_no_checkpoint_is_whole_all_are_named_and_none_is_touched(world: World, tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, world, 2, 4)
    for step in (2, 4):
        (tmp_path / "checkpoints" / f"step_{step:08d}" / "rng.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no whole checkpoint in .*step_00000004: rng.pt.*step_00000002: rng.pt"):
        resumed(checkpoints)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000002", "step_00000004"]


def test_a_checkpoint_of_a_version_without_manifests_is_resumed(world: World, tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, world, 2, 4)
    for manifest in tmp_path.rglob(MANIFEST):
        manifest.unlink()
    assert resumed(checkpoints) == (4, 4.0)


def test_a_torn_permanent_checkpoint_gives_way_to_the_other_of_its_step(world: World, tmp_path: Path) -> None:
    saved(tmp_path, world, 4)
    checkpoints = saved(tmp_path, world, 4, keep_every=4)
    halve(tmp_path / "checkpoints" / "permanent" / "step_00000004" / MANIFEST)
    assert resumed(checkpoints) == (4, 4.0)


def test_the_manifest_is_of_every_file(world: World, tmp_path: Path) -> None:
    saved(tmp_path, world, 2)
    step = tmp_path / "checkpoints" / "step_00000002"
    listed = json.loads((step / MANIFEST).read_text())["files"]
    there = {str(path.relative_to(step)): path.stat().st_size for path in step.rglob("*") if path.is_file()}
    del there[MANIFEST]
    assert {file: size for file, (size, _) in listed.items()} == there


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As a disk that is full: a write behind `size` bytes fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [3000, 100], ids=["the weights", "the first byte of any"])
def test_a_disk_that_is_full_is_named_and_the_checkpoint_before_stays(world: World, tmp_path: Path, size: int) -> None:
    checkpoints = saved(tmp_path, world, 2, keep=1)
    with files_of_at_most(size), pytest.raises(DiskFull, match=rf"writing to {tmp_path}.*step_00000004") as told:
        checkpoints.save(4, {"av": Number(4.0, 1 << 16)}, {}, {})
    assert "the checkpoint before" in told.value.remedy
    assert resumed(checkpoints) == (2, 2.0)
    checkpoints.save(4, {"av": Number(4.0)}, {}, {})
    assert resumed(checkpoints) == (4, 4.0)


def test_a_save_leaves_no_process_that_would_outlive_a_killed_run(tmp_path: Path, world: World) -> None:
    saved(tmp_path, world, 1, 2)
    assert resumed(saved(tmp_path, world)) == (2, 2.0)
    assert multiprocessing.active_children() == []
