"""What an engine will need of vLLM, imported ahead: ranks that are forked from this process share it."""

from importlib import import_module
from importlib.util import find_spec

# Without vLLM the policy may write its responses itself.
if find_spec("vllm") is not None:
    for part in (
        "entrypoints.llm", "model_executor.models.qwen3", "v1.engine.llm_engine", "v1.executor.uniproc_executor",
        "v1.attention.backends.cpu_attn", "model_executor.layers.quantization.compressed_tensors.compressed_tensors",
    ):  # fmt: skip
        import_module(f"vllm.{part}")
    # Only a machine without CUDA forks its ranks.
    import_module("nla_megatron.rollout.cpu_worker")
