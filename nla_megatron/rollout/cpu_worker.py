"""vLLM's CPU worker, intervening, with three things mended.

vLLM names the shared-memory segments of its CPU collectives after the rendezvous address, which is the same for every
engine that an external launcher starts: two runs on one machine would write into each other's tensors, silently.

It draws a token for every request of a batch, also for those whose prompt is cut and goes on in the next one, and winds
the generator of a seeded one back by an offset, which a CPU's generator does not have: the step would end there.

Where nothing is to be compiled, it still compiles small functions in every process anew: the count of likelier tokens,
the mask of a rank's part of the vocabulary. On a CPU that takes seconds and a C++ compiler, and saves less in hours of
sampling.
"""

from __future__ import annotations

import os
import uuid
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.v1.worker.cpu_worker import CPUWorker

from nla_megatron.rollout.start import SEGMENT_VARIABLE
from nla_megatron.rollout.worker import InterveningWorker, marking

_PREFIX = "nla_megatron"
_SEGMENTS = Path("/dev/shm")


class IsolatedCpuWorker(InterveningWorker, CPUWorker):
    """The worker class that the engine asks vLLM for on a CPU."""

    def init_device(self) -> Any:
        # The groups exist already, so the address is only a name here; vLLM takes what follows its last colon.
        self.distributed_init_method = f"env://:{os.environ[SEGMENT_VARIABLE]}"
        return super().init_device()

    def execute_model(self, *given: Any, **named: Any) -> Any:
        with self._as_written():
            return super().execute_model(*given, **named)

    def sample_tokens(self, *given: Any, **named: Any) -> Any:
        with self._as_written():
            return super().sample_tokens(*given, **named)

    def compile_or_warm_up_model(self) -> Any:
        with self._as_written():
            return super().compile_or_warm_up_model()

    def _as_written(self) -> AbstractContextManager[Any]:
        """Inside, nothing is compiled where the engine is to run eagerly."""
        eager = self.vllm_config.model_config.enforce_eager
        return torch.compiler.set_stance("force_eager") if eager else nullcontext()

    def runner_class(self, base: Any) -> Any:
        return _rewinding(marking(base))


def _rewinding(base: Any) -> Any:
    class RewindingRunner(base):
        """Keeps the state of the generators whose draw will not count."""

        def _prepare_inputs(self, *args: Any) -> Any:
            prepared = super()._prepare_inputs(*args)
            generators = self.input_batch.generators
            cut = np.flatnonzero(self.discard_request_mask.np[: self.input_batch.num_reqs]).tolist()
            self.states = {index: generators[index].get_state() for index in cut if index in generators}
            return prepared

        def _bookkeeping_sync(self, *args: Any) -> Any:
            generators = self.input_batch.generators
            for index, state in self.states.items():
                generators[index].set_state(state)
            self.input_batch.generators = {}
            try:
                return super()._bookkeeping_sync(*args)
            finally:
                self.input_batch.generators = generators

    return RewindingRunner


def segment_name() -> str:
    """A name no other run has, with the process that answers for it."""
    return f"{_PREFIX}.{os.getpid()}.{uuid.uuid4().hex[:8]}"


def remove_stale_segments() -> None:
    """Give back the memory of runs that were killed: segments whose process is gone."""
    for segment in _SEGMENTS.glob(f"{_PREFIX}.*"):
        owner = segment.name.split(".")[1]
        if not Path(f"/proc/{owner}").exists():
            segment.unlink(missing_ok=True)
