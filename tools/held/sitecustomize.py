"""Python imports this at the start of each process under `tools/held_to.py`: it answers for the processor.

The two modules that ask it are changed as soon as they have been imported, before anybody calls them.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

BEYOND = {
    "avx2": ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_vnni_supported", "_is_amx_tile_supported",
             "_is_amx_fp16_supported"),
    "avx512": ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported"),
}  # fmt: skip
"""What the processor of a level does not have, as `torch.cpu` asks; vLLM chooses its library by these."""


def _no() -> bool:
    return False


def _answers(level: str) -> dict[str, tuple[str, ...]]:
    return {"torch.cpu": BEYOND[level], "bitsandbytes.functional": ("has_avx512bf16",)}


class _Answering(PathFinder):
    """Finds the modules that ask the processor, and nothing else."""

    answers = _answers(os.environ["HELD_TO"])

    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = super().find_spec(fullname, path, target) if fullname in cls.answers else None
        loader: Any = spec.loader if spec else None
        if loader is None:
            return spec
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            for question in cls.answers[fullname]:
                # A question that is asked no more would leave the process as the processor is, unseen.
                getattr(module, question)
                setattr(module, question, _no)

        loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Answering)
