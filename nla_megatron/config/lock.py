"""A directory that one command at a time writes: another is refused for as long as the first one lives.

Two things say who that is. The kernel's lock on a file ends with the process that holds it, however that ends; the
record in the file names host, process and start of the owner, for messages, and for file systems without locks or with
locks that other hosts do not see. A record whose owner is dead is taken over.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from nla_megatron.disk import room_on
from nla_megatron.errors import RunDirectoryError

_HELD = (errno.EACCES, errno.EAGAIN)
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
# A job in one of these states of Slurm has processes; in any other, or unknown, it has none.
_RUNNING = {"RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}
_ASKING_SECONDS = 20.0


@dataclass(frozen=True)
class Owner:
    """A process: `start` tells it from a later one with the same number, on this boot of the host or another.

    `job` and `restart` are Slurm's, "" and 0 without it. `since` is for people.
    """

    host: str
    process: int
    start: str
    since: str
    job: str = ""
    restart: int = 0

    @classmethod
    def here(cls) -> Owner:
        environment, process = os.environ, os.getpid()
        return cls(
            socket.gethostname(), process, _start_of(process) or "", time.strftime("%Y-%m-%d %H:%M:%S"),
            environment.get("SLURM_JOB_ID", ""), int(environment.get("SLURM_RESTART_COUNT") or 0),
        )  # fmt: skip

    def is_gone(self, me: Owner) -> bool | None:
        """Whether it has ended; None where that cannot be told from here."""
        if self.host == me.host:
            return self.process == me.process or _start_of(self.process) != self.start
        if self.job and self.job == me.job and self.restart < me.restart:
            return True  # Slurm has ended a job before it starts it again
        return True if self.job and _slurm_has_ended(self.job) else None

    def __str__(self) -> str:
        of_job = f" of the job {self.job}" if self.job else ""
        return f"process {self.process}{of_job} on {self.host} since {self.since}"


class Lock:
    """Byte 0 of a file is the first process's alone; byte 1 is shared by it and its workers."""

    def __init__(self, directory: Path, name: str):
        """`directory`: what is made, in which `name` is the file of the lock."""
        self.directory, self.path = directory, directory / name
        self._file: IO[bytes] | None = None
        self._is_worker = False

    def refuse_owned(self) -> None:
        """Take nothing; raises RunDirectoryError where the owner on record lives."""
        owner = self._recorded()
        gone = owner is None or owner.is_gone(Owner.here())
        if owner is not None and not gone:
            raise self._refusal(owner, gone)

    def take(self) -> None:
        """Become the one command. Raises RunDirectoryError where another one, or a worker of one, is at it."""
        with room_on(self.directory):
            self._open()
        self._lock(fcntl.LOCK_EX, 0, 2)
        self._lock(fcntl.LOCK_SH, 1, 1)
        try:
            self.refuse_owned()
            self._write(json.dumps(asdict(Owner.here())))
        except BaseException:
            self._close()
            raise

    def join(self) -> None:
        """Hold on to it as a worker."""
        if self._file is None:
            self._open()
            self._is_worker = True
            self._lock(fcntl.LOCK_SH, 1, 1)

    def leave(self) -> None:
        """A worker has nothing more to write."""
        if self._is_worker:
            self._close()

    def release(self) -> None:
        """The command is over: nobody owns the directory."""
        if self._file is not None and not self._is_worker:
            self._write("")
        self._close()

    def _open(self) -> None:
        # Not to be truncated: the record is another's until the lock is ours.
        # Nothing is buffered: on a full disk closing would try once more what was refused, and raise again.
        self._file = self.path.open("a+b", buffering=0)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, record: str) -> None:
        assert self._file is not None
        with room_on(self.path):
            self._file.truncate(0)
            self._file.write(record.encode())
            self._file.flush()
            os.fsync(self._file.fileno())

    def _recorded(self) -> Owner | None:
        """None where nobody is, or a crash has left half a record.

        While the lock is held the file is read through the one handle: the kernel's lock would end with the first one
        that is closed.
        """
        try:
            if self._file is None:
                text = self.path.read_bytes()
            else:
                self._file.seek(0)
                text = self._file.read()
            return Owner(**json.loads(text))
        except (OSError, ValueError, TypeError):
            return None

    def _lock(self, kind: int, start: int, length: int) -> None:
        assert self._file is not None
        try:
            fcntl.lockf(self._file, kind | fcntl.LOCK_NB, length, start)
        except OSError as error:
            if error.errno in _WITHOUT_LOCKS:
                return
            owner = self._recorded()
            self._close()
            if error.errno not in _HELD:
                raise
            raise self._refusal(owner, False) from None

    def _refusal(self, owner: Owner | None, gone: bool | None) -> RunDirectoryError:
        who = "another process" if owner is None else str(owner)
        remedy = "wait for it or end it, or choose another out="
        if gone is None and owner is not None:
            remedy += f"; if it runs no more on {owner.host}, remove {self.path} and repeat the command to take over"
        return RunDirectoryError(
            f"{self.directory} is being written by {who}", "one command at a time for each out=", remedy
        )


def _start_of(process: int) -> str | None:
    """The boot of this host and the clock ticks after it at which a process began; None where there is none."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None if not _answers(process) else "unknown"
    state, *fields = stat.rpartition(")")[2].split()  # the name before it may hold spaces
    return None if state in "ZX" else f"{boot} {fields[18]}"


def _answers(process: int) -> bool:
    """Where there is no /proc."""
    if Path("/proc/self").exists():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _slurm_has_ended(job: str) -> bool:
    try:
        told = subprocess.run(
            ["squeue", "--noheader", "--format=%T", f"--jobs={job}"],
            capture_output=True, text=True, check=False, timeout=_ASKING_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return False
    if told.returncode:
        return "Invalid job id" in told.stderr  # which is said of jobs that are long gone
    return not _RUNNING & set(told.stdout.split())
