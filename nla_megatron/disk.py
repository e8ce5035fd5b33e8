"""What a disk answers when it cannot do what it is told, as named errors; and bytes that have really reached it."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nla_megatron.errors import DiskFull, NlaError, RunDirectoryError

_READ_BYTES = 16 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR)
_WRITERS = ("PytorchStreamWriter", "unexpected pos", "basic_ios")
"""How torch's own writer tells of a write that failed; it keeps the reason to itself."""
_THEN = "make room and repeat the command: it continues where it was"


@contextmanager
def room_on(
    directory: Path, then: str = "make room and repeat the command: it continues where it was"
) -> Iterator[None]:
    """Inside, a full disk, a used-up quota and a limit on the size of a file raise DiskFull, and a place that is not
    ours to write to raises RunDirectoryError.

    Args:
        then: what the user can do about a full disk.
    """
    try:
        yield
    except BaseException as error:  # torch's CheckpointException is no Exception
        told = named(error, directory, then)
        if told is None:
            raise
        raise told from error


def named(
    error: BaseException, directory: Path | None, then: str = "make room and repeat the command"
) -> NlaError | None:
    """The named error of what a disk has refused, wherever in a chain of errors it is; None where it refused nothing.

    Args:
        directory: where was written, for refusals that do not say it themselves.
    """
    if isinstance(error, NlaError):
        return None
    for one in _chain(error):
        if isinstance(one, OSError) and one.errno in _FULL:
            return _full(os.strerror(one.errno or 0), one.filename or directory, then)
        if isinstance(one, OSError) and one.errno in _FORBIDDEN:
            return RunDirectoryError(
                f"{os.strerror(one.errno or 0)}: {one.filename or directory}", "files that may be read and written",
                "change the path or its permissions, or choose another out=",
            )  # fmt: skip
        if isinstance(one, RuntimeError) and any(word in str(one) for word in _WRITERS):
            return _full(f"a write failed ({str(one).splitlines()[0][:80]})", directory, then)
    return None


def _full(found: str, path: Path | str | None, then: str) -> DiskFull:
    free = "" if path is None else f" ({size(_free(Path(path)))} free there)"
    return DiskFull(f"{found}, writing to {path or 'a file'}{free}", "room for all that is written", then)


def _free(path: Path) -> int:
    place = path.resolve()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what it was raised from; torch's checkpoints keep what each rank met in `failures`."""
    seen: set[int] = set()
    todo = [error]
    while todo:
        one = todo.pop(0)
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        failures = getattr(one, "failures", None)
        todo += [failed[0] for failed in failures.values()] if isinstance(failures, dict) else []
        todo += [one.__cause__, one.__context__]


def size(count: int) -> str:
    """A number of bytes as people read it."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count} bytes"


def flush_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def checksum(path: Path) -> list[Any]:
    """Size and xxh3 checksum of a file, which costs much less than writing it did."""
    import xxhash

    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while part := file.read(_READ_BYTES):
            digest.update(part)
            size += len(part)
    return [size, digest.hexdigest()]
