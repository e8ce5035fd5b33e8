"""Run a command as an older x86 processor would, with all that it starts: `python tools/held_to.py avx2 make test`.

torch, oneDNN and MKL read variables; bitsandbytes and vLLM ask the processor itself and are answered by
`held/sitecustomize.py`, which every Python process of the command imports at its start. What changes are kernels, and
so the order of sums and the precision of products: a test whose outcome changes leans on the processor.

    avx2      neither AVX-512 nor bf16: vLLM's AVX2 library
    avx512    AVX-512 without bf16 and AMX: vLLM's AVX-512 library

The exit code is the command's. Processes find `held/` by PYTHONPATH: what replaces that variable has to keep what it
holds.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

LEVELS = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
}
HELD = Path(__file__).resolve().parent / "held"


def held(environment: Mapping[str, str], level: str) -> dict[str, str]:
    """The environment of a command that is held to a level of `LEVELS`."""
    paths = [str(HELD), *filter(None, [environment.get("PYTHONPATH")])]
    return {**environment, **LEVELS[level], "HELD_TO": level, "PYTHONPATH": os.pathsep.join(paths)}


def main(arguments: Sequence[str]) -> int:
    if len(arguments) < 2 or arguments[0] not in LEVELS:
        print(f"usage: python tools/held_to.py {'|'.join(LEVELS)} COMMAND [ARGUMENT ...]", file=sys.stderr)
        return 2
    if platform.machine() not in ("x86_64", "AMD64"):
        print(f"this processor is {platform.machine()}; levels are of x86-64", file=sys.stderr)
        return 2
    level, *command = arguments
    return subprocess.run(command, env=held(os.environ, level)).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
