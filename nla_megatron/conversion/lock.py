"""A directory that one command at a time makes: others are refused as long as any of its processes lives.

The lock is the kernel's and ends with the process that holds it, however that ends. Where a file system has no locks
nothing is held.
"""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path
from typing import IO

from nla_megatron.errors import RunDirectoryError

_HELD = (errno.EACCES, errno.EAGAIN)
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class Lock:
    """Byte 0 of a file is the first process's alone; byte 1 is shared by it and its workers."""

    def __init__(self, directory: Path, name: str):
        """`directory`: what is made, in which `name` is the file of the lock."""
        self.directory, self.path = directory, directory / name
        self._file: IO[bytes] | None = None
        self._is_worker = False

    def take(self) -> None:
        """Become the one command. Raises RunDirectoryError where another one, or a worker of one, is at it."""
        self._open()
        self._lock(fcntl.LOCK_EX, 0, 2)
        self._lock(fcntl.LOCK_SH, 1, 1)

    def join(self) -> None:
        """Hold on to it as a worker."""
        if self._file is None:
            self._open()
            self._is_worker = True
            self._lock(fcntl.LOCK_SH, 1, 1)

    def leave(self) -> None:
        """A worker has nothing more to write."""
        if self._is_worker:
            self.release()

    def _open(self) -> None:
        self._file = self.path.open("a+b")

    def _lock(self, kind: int, start: int, length: int) -> None:
        assert self._file is not None
        try:
            fcntl.lockf(self._file, kind | fcntl.LOCK_NB, length, start)
        except OSError as error:
            if error.errno in _WITHOUT_LOCKS:
                return
            self.release()
            if error.errno not in _HELD:
                raise
            raise RunDirectoryError(
                f"{self.directory} is being written by another process", "one command for each out=",
                "wait for it or end it, or choose another out=",
            ) from None  # fmt: skip

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
