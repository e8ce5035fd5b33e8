"""Start processes on this machine: the ranks of a command, and commands of a process of their own."""

from __future__ import annotations

import ctypes
import gc
import importlib
import logging
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from types import FrameType
from typing import Any

Entry = Callable[[Sequence[str]], int]
"""Runs a command line without the program's name; returns the exit code."""

PRELOAD, PRELOAD_TRAINING = "nla_megatron.launch.preload", "nla_megatron.launch.preload_training"
_LAST_WORDS_SECONDS = 2.0
_PR_SET_PDEATHSIG = 1  # of prctl, which Linux alone has


def launch(entry: Entry, argv: Sequence[str], processes: int, preload: Sequence[str]) -> int:
    """Run `entry(argv)` in `processes` ranks; the exit code is that of the rank that failed first, else 0.

    The ranks are forks of this process, which has imported the modules of `preload`: imports cost once, not once a
    rank. With CUDA they start afresh, because a fork cannot use a device that its parent may have touched.
    When a rank dies, however it dies, the others and whatever they have started are ended.
    """
    # With several ranks on a machine, one thread each: more would only fight for the cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    import torch
    from torch.distributed import TCPStore
    from torch.multiprocessing import ProcessExitedException, start_processes

    # The failed rank has said what was wrong; that the others are ended is no news.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    # A fork of a process with worker threads would wait for them for ever.
    torch.set_num_threads(1)
    forks = not torch.cuda.is_available()
    for module in preload if forks else ():
        importlib.import_module(module)
    keep_for_forks()
    with socket.create_server(("127.0.0.1", 0)) as door, interrupted_by_sigterm():
        port = door.getsockname()[1]
        sys.stdout.flush()
        sys.stderr.flush()
        pids: list[int] = []
        try:
            ranks = start_processes(
                _rank, (entry, argv, processes, port, os.getpid()), processes, join=False,
                start_method="fork" if forks else "spawn",
            )  # fmt: skip
            pids += ranks.pids()
            # The store lives here, so that it outlives every rank; its threads start after the forks.
            store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=door.detach())
            while not ranks.join(grace_period=_LAST_WORDS_SECONDS):
                pass
        except ProcessExitedException as failed:
            return _exit_code(failed.error_index, failed.exit_code)
        finally:
            _end(pids)
    del store
    return 0


def _end_with(launcher: int) -> None:
    """From now on this process is killed when its launcher ends, even by SIGKILL.

    Torch asks for SIGINT, which whatever a script has started in the background ignores.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # it has ended already
        os._exit(1)


def _rank(rank: int, entry: Entry, argv: Sequence[str], processes: int, port: int, launcher: int) -> None:
    _end_with(launcher)
    # A group of its own holds the rank and every helper it starts; the launcher ends them together.
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # A scheduler warns every process of a job; the one it started answers, and ends the ranks.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0",
    )  # fmt: skip
    sys.exit(entry(argv))


def _exit_code(rank: int, code: int) -> int:
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    print(f"rank {rank} was ended by {name}; all ranks are down. Repeat the command to resume.", file=sys.stderr)
    return 128 - code


def _end(ranks: Sequence[int]) -> None:
    """End the groups of `ranks`, and ranks that were still starting: those are known as children alone."""
    for child in multiprocessing.active_children():
        child.kill()
    for rank in ranks:
        try:
            os.killpg(rank, signal.SIGKILL)
        except ProcessLookupError:  # it left nothing behind
            continue


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Inside, SIGTERM raises SystemExit, so that what was started is ended too."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def keep_for_forks() -> None:
    """What is imported by now stays shared with processes forked later: no garbage collection of theirs touches it.

    Libraries collect several times while they start, each time through all objects of all packages.
    """
    gc.freeze()


def warm_up(preload: str = PRELOAD) -> None:
    """Start the server that `command_process` forks from; it imports while this process does something else.

    A server that runs already keeps what it has imported.
    """
    forkserver.set_forkserver_preload([preload])
    forkserver.ensure_running()


def command_process(entry: Entry, argv: Sequence[str], preload: str = PRELOAD) -> Any:
    """A process, not started yet, that runs `entry(argv)` and exits with its code.

    It is forked from a server that has imported what the commands need (see `launch.preload`): the imports of all
    commands that this process runs are paid once.
    """
    warm_up(preload)
    return multiprocessing.get_context("forkserver").Process(target=_command, args=(entry, argv))


def _command(entry: Entry, argv: Sequence[str]) -> None:
    sys.exit(entry(argv))
