"""`plan`: what a layout would move, from a config.json alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def vllm_config(directory: str | Path, dtype: Any) -> Any:
    """vLLM's configuration of a model of which there need be only a config.json."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=str(directory), skip_tokenizer_init=True, enforce_eager=True, dtype=dtype, load_format="dummy"
    ).create_engine_config()
