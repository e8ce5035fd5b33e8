"""Whether all of a checkpoint is there: `files.json` in a step's directory says size and checksum of every file of it.

It is written last, so that a checkpoint without one is of an older version, or cut short: of those is checked what
they say of themselves.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from nla_megatron.contract.files import write_json
from nla_megatron.contract.journal import read_object
from nla_megatron.conversion.torch_dist_reader import TorchDistReader
from nla_megatron.disk import checksum, flush_to_disk, room_on
from nla_megatron.errors import CheckpointError, NlaError
from nla_megatron.parallel.collectives import barrier, broadcast_object, gather_objects
from nla_megatron.parallel.world import World

MANIFEST, STATE, GENERATOR = "files.json", "state.json", "rng.pt"
_CHECKSUM = "xxh3_128"
_WRITER = re.compile(r"__(\d+)_\d+\.distcp")
_SHOWN = 3


def seal(directory: Path, world: World) -> None:
    """Send every file of a directory to the disk, and write what they are; collective, once all are written."""
    barrier(world)
    files = _files(directory)
    # The bytes that a rank has written are still in its host's memory.
    mine = [file for number, file in enumerate(files) if _writer(file, number) % world.size == world.rank]
    with room_on(directory):
        for file in mine:
            flush_to_disk(directory / file)
    entries: dict[str, Any] = {}
    for share in gather_objects({file: checksum(directory / file) for file in mine}, world):
        entries |= share
    if world.is_main:
        with room_on(directory):
            write_json(directory / MANIFEST, {"checksum": _CHECKSUM, "files": dict(sorted(entries.items()))})


def faults(directory: Path, world: World) -> list[str]:
    """What is not as it was written, in words; empty of a whole checkpoint. Collective, the same on every rank."""
    known: Any = broadcast_object(_manifest(directory) if world.is_main else None, world)
    if known is None:
        return broadcast_object(_faults_of_older(directory) if world.is_main else None, world)
    if isinstance(known, str):
        return [known]
    mine = [
        told
        for number, (file, entry) in enumerate(known.items())
        if number % world.size == world.rank and (told := _difference(directory / file, file, entry))
    ]
    return [told for share in gather_objects(mine, world) for told in share]


def check_whole(directory: Path, world: World) -> None:
    """Raises CheckpointError, on every rank, where something is missing or damaged; collective."""
    if found := faults(directory, world):
        raise CheckpointError(
            f"{directory} is not whole: {shortened(found)}", "every file as it was written",
            "take another checkpoint, or copy this one again",
        )  # fmt: skip


def shortened(found: list[str]) -> str:
    more = len(found) - _SHOWN
    return "; ".join(found[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def _writer(file: str, number: int) -> int:
    """The rank that wrote a file, where its name says so; the others are shared out."""
    named = _WRITER.fullmatch(Path(file).name)
    return int(named[1]) if named else number


def _manifest(directory: Path) -> dict[str, list[Any]] | str | None:
    """What the files were, None of an older checkpoint; in words, why it cannot be read."""
    path = directory / MANIFEST
    if not path.is_file():
        return None
    try:
        found = read_object(path, ("checksum", "files"))
    except NlaError as error:
        return error.found
    if found["checksum"] != _CHECKSUM or not isinstance(found["files"], dict):
        return f"{path} with checksums of the kind {found['checksum']!r}, not {_CHECKSUM}"
    return found["files"]


def _difference(path: Path, file: str, entry: list[Any]) -> str | None:
    size = entry[0]
    if not path.is_file():
        return f"no {file}"
    if path.stat().st_size != size:
        return f"{file} has {path.stat().st_size} bytes, not {size}"
    return None if checksum(path) == list(entry) else f"{file} holds other bytes than were written"


def _faults_of_older(directory: Path) -> list[str]:
    """Of a checkpoint without a manifest: whether its files can be read, and are as long as they say."""
    found: list[str] = []

    def attempt(read: Callable[[], Any]) -> Any:
        try:
            return read()
        except NlaError as error:
            found.append(error.found.replace(f"{directory}/", ""))
        return None

    state = attempt(lambda: read_object(directory / STATE, ("stage", "step", "modules")))
    for name in state["modules"] if state else []:
        attempt(partial(TorchDistReader, directory / name))
        attempt(partial(_unpickled, directory / name / "common.pt"))
    attempt(partial(_unpickled, directory / GENERATOR))
    return found


def _unpickled(path: Path) -> None:
    """Raises CheckpointError where torch did not write all of a file: its table of contents is at the end."""
    import zipfile

    if not path.is_file() or not zipfile.is_zipfile(path):
        size = path.stat().st_size if path.is_file() else 0
        raise CheckpointError(f"{path} of {size} bytes", "a whole file", "take another checkpoint")
