"""What an engine will need of vLLM, imported ahead: ranks that are forked from this process share it."""

import vllm.entrypoints.llm
import vllm.model_executor.models.qwen3
import vllm.v1.engine.llm_engine
import vllm.v1.executor.uniproc_executor  # noqa: F401
