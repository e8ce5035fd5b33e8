"""A conversion under way in OUT.partial: killed at any moment it continues where it was, with any number of workers.

    OUT.partial/journal/plan.json     what is converted from what: another conversion is refused
    OUT.partial/journal/lock          held by the processes that are at it: a second command is refused
    OUT.partial/journal/FILE.json     FILE is finished and on the disk
    OUT.partial/FILE                  finished, or to be written again

OUT appears by one rename when all files are there; until then nothing bears its name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nla_megatron.config.lock import Lock
from nla_megatron.contract.files import write_json
from nla_megatron.conversion.hf import MANIFEST, read_json
from nla_megatron.disk import flush_to_disk, room_on, size
from nla_megatron.errors import DiskFull, RunDirectoryError

JOURNAL = "journal"
_FLUSH_BYTES = 128 << 20


class Work:
    """What is done of a conversion, and what is not.

    Args:
        out: the directory that the conversion makes.
        plan: what is converted from what, as JSON; two conversions are the same if their plans are.
        durable: wait for the disk, so that what is noted as finished is so after a power cut too; else only a kill is
            provided for.
    """

    def __init__(self, out: str | Path, plan: dict[str, Any], durable: bool = True):
        self.out, self.partial = Path(out), Path(f"{out}.partial")
        self.journal = self.partial / JOURNAL
        self.plan = json.loads(json.dumps(plan))
        self._flusher = ThreadPoolExecutor(1)
        self._flushing: list[Future[None]] = []
        self._behind, self.durable = 0, durable
        self._lock = Lock(self.partial, f"{JOURNAL}/lock")

    def check(self) -> bool:
        """Whether `out` is there already, made by this very conversion.

        Raises:
            RunDirectoryError: `out` holds something else, or OUT.partial another conversion.
        """
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            manifest = self.out / MANIFEST
            found = read_json(manifest).get("options") if manifest.is_file() else None
            if found is None:
                raise RunDirectoryError(
                    f"{self.out} is not empty and no conversion's result", "a new or empty directory",
                    "choose another out=",
                )  # fmt: skip
            self._compare(found, self.out, "choose another out=")
            # A kill right behind the rename leaves the journal of what is finished.
            shutil.rmtree(self.out / JOURNAL, ignore_errors=True)
            return True
        if (self.journal / "plan.json").is_file():
            found = read_json(self.journal / "plan.json")
            self._compare(found, self.partial, f"repeat its own command, or remove {self.partial}")
        elif self.partial.is_file() or any(map(self._is_outside_journal, self.partial.rglob("*"))):
            raise RunDirectoryError(
                f"{self.partial}, which no conversion began", "nothing there, or what a killed conversion left",
                "move it away, or choose another out=",
            )  # fmt: skip
        return False

    def _is_outside_journal(self, path: Path) -> bool:
        return path.is_file() and self.journal not in path.parents

    def _compare(self, found: dict[str, Any], where: Path, remedy: str) -> None:
        for key in sorted({*found, *self.plan}):
            if found.get(key) != self.plan.get(key):
                raise RunDirectoryError(
                    f"{where} holds a conversion with {key}={_short(found.get(key))}",
                    f"{key}={_short(self.plan.get(key))}, as in this command", remedy,
                )  # fmt: skip

    def check_room(self, needed: int) -> None:
        """Raises RunDirectoryError where nothing can be written, DiskFull where `needed` bytes, less what is there
        already, do not fit."""
        place = self.partial
        while not place.exists():
            place = place.resolve().parent
        if not place.is_dir() or not os.access(place, os.W_OK):
            raise RunDirectoryError(f"{place}, where nothing can be written", "a directory", "choose another out=")
        written = sum(path.stat().st_size for path in self.partial.glob("*") if path.is_file())
        written += sum(path.stat().st_size for path in self.partial.glob("weights/*"))
        free = shutil.disk_usage(place).free
        if needed - written > free:
            raise DiskFull(
                f"{size(free)} free at {place}", size(needed - written),
                "make room, or choose another out=",
            )  # fmt: skip

    def begin(self) -> None:
        """Make OUT.partial this conversion's; one process calls it.

        Raises RunDirectoryError where another one is at it, or has finished it since `check`.
        """
        with room_on(self.partial):
            self.journal.mkdir(parents=True, exist_ok=True)
            self._lock.take()
            if self.check():
                shutil.rmtree(self.partial, ignore_errors=True)
                raise RunDirectoryError(f"{self.out} has just been made by another process", "one", "nothing")
            if not (self.journal / "plan.json").is_file():
                write_json(self.journal / "plan.json", self.plan)

    def join(self) -> None:
        """Each process, once one has begun: until its `flush` no other command writes here."""
        with room_on(self.partial):
            self._lock.join()

    def unfinished(self, files: Sequence[str]) -> list[str]:
        return [file for file in files if not (self._entry(file).is_file() and (self.partial / file).is_file())]

    def _entry(self, file: str) -> Path:
        return self.journal / f"{file.replace('/', '-')}.json"

    def flush_behind(self, file: str, nbytes: int) -> None:
        """Tell that so many more bytes of FILE are coming; from time to time those before are sent to the disk."""
        self._behind += nbytes
        if self.durable and self._behind >= _FLUSH_BYTES and all(done.done() for done in self._flushing):
            self._behind = 0
            self._flushing.append(self._flusher.submit(flush_to_disk, self.partial / file))

    def finish(self, file: str, entry: dict[str, Any]) -> None:
        """Note in the background that FILE is whole, once its bytes are on the disk."""
        self._flushing.append(self._flusher.submit(self._finish, file, entry))

    def _finish(self, file: str, entry: dict[str, Any]) -> None:
        with room_on(self.partial):
            if self.durable:
                flush_to_disk(self.partial / file)
                write_json(self._entry(file), entry)
            else:
                part = self._entry(file).with_suffix(".part")
                part.write_text(json.dumps(entry))
                part.replace(self._entry(file))

    def flush(self) -> None:
        """Wait for what `finish` began; raises what went wrong there."""
        for done in self._flushing:
            done.result()
        self._flushing.clear()
        self._lock.leave()

    def entries(self, files: Sequence[str]) -> list[dict[str, Any]]:
        return [json.loads(self._entry(file).read_text()) for file in files]

    def publish(self) -> None:
        """The last step, by one process: OUT.partial becomes OUT."""
        # The lock would end with the first file handle on it that is closed.
        for path in filter(self._is_outside_journal, self.partial.rglob("*") if self.durable else ()):
            flush_to_disk(path)
        if self.out.exists():
            self.out.rmdir()
        self.partial.rename(self.out)
        self._lock.release()
        shutil.rmtree(self.out / JOURNAL)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
