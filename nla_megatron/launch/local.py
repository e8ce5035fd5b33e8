"""Start a command's processes on this machine, and end with their exit code."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path


def launch(argv: Sequence[str], processes: int) -> int:
    """Run `nla-megatron argv` in `processes` ranks; the exit code is that of the rank that failed first, else 0.

    torchrun's own agent watches the ranks: when one dies, however it dies, the others are ended.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The failed rank has said what was wrong; the agent's own account would bury it.
    for name in (
        "torch.distributed.elastic",
        "torch.distributed.elastic.multiprocessing.api",
        "torch.distributed.elastic.agent.server.api",
    ):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # With several ranks on a machine, one thread each: more would only fight for the cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    run_id = f"nla-{uuid.uuid4().hex}"
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=run_id, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.2,
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-m", "nla_megatron", *argv)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            print(
                f"rank {rank} was ended by {name}; all ranks are down. Repeat the command to resume.", file=sys.stderr
            )
            return 128 - failure.exitcode
        return failure.exitcode
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    finally:
        _end_what_ranks_started(run_id)
    return 0


def _end_what_ranks_started(run_id: str) -> None:
    """End the helper processes of ranks that were killed: nobody else would, and they hold on to files and pipes."""
    mark = f"TORCHELASTIC_RUN_ID={run_id}".encode()
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in environ.read_bytes().split(b"\0"):
                os.kill(int(environ.parent.name), signal.SIGKILL)
        except OSError:  # ended in the meantime, or somebody else's
            continue
