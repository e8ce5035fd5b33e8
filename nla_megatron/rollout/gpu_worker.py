"""vLLM's GPU worker, intervening."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from nla_megatron.rollout.worker import InterveningWorker


class InterveningGpuWorker(InterveningWorker, Worker):
    """The worker class that the engine asks vLLM for on a GPU."""
