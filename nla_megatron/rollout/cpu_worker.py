"""vLLM's CPU worker with shared-memory segments of its own.

vLLM names the segments of its CPU collectives after the rendezvous address, which is the same for every engine that an
external launcher starts: two runs on one machine would write into each other's tensors, silently.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

_PREFIX = "nla_megatron"
_SEGMENTS = Path("/dev/shm")
NAME_VARIABLE = "NLA_MEGATRON_SEGMENTS"


class IsolatedCpuWorker(CPUWorker):
    """The worker class that the engine asks vLLM for on a CPU."""

    def init_device(self) -> Any:
        # The groups exist already, so the address is only a name here; vLLM takes what follows its last colon.
        self.distributed_init_method = f"env://:{os.environ[NAME_VARIABLE]}"
        return super().init_device()


def segment_name() -> str:
    """A name no other run has, with the process that answers for it."""
    return f"{_PREFIX}.{os.getpid()}.{uuid.uuid4().hex[:8]}"


def remove_stale_segments() -> None:
    """Give back the memory of runs that were killed: segments whose process is gone."""
    for segment in _SEGMENTS.glob(f"{_PREFIX}.*"):
        owner = segment.name.split(".")[1]
        if not Path(f"/proc/{owner}").exists():
            segment.unlink(missing_ok=True)
