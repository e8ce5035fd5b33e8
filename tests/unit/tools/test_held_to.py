"""Held to an older processor, the libraries answer and compute as there, also in processes that a command starts."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
TOOL = ROOT / "tools" / "held_to.py"
ASK = """
import json
import torch
from bitsandbytes.nn import Linear4bit
from vllm.platforms import current_platform

current_platform.import_kernels()
libraries = {line.split("/")[-1].strip() for line in open("/proc/self/maps") if "/vllm/_C" in line}
found = [torch.backends.cpu.get_cpu_capability(), bool(Linear4bit(64, 64).support_avx512bf16_for_cpu), *libraries]
print(json.dumps(found))
"""
LIBRARIES = {"avx2": "_C_AVX2.abi3.so", "avx512": "_C_AVX512.abi3.so"}
CAPABLE = {"avx2": torch.cpu._is_avx2_supported, "avx512": torch.cpu._is_avx512_supported}

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="levels are of x86-64")


@pytest.mark.parametrize("level", LIBRARIES)
def test_torch_bitsandbytes_and_vllm_are_those_of_the_level(level: str, tmp_path: Path) -> None:
    if not CAPABLE[level]():
        pytest.skip(f"this processor has no {level}")
    (tmp_path / "ask.py").write_text(ASK)
    command = ["sh", "-c", f"{sys.executable} ask.py; exit $?"]
    done = subprocess.run(
        [sys.executable, TOOL, level, *command], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [level.upper(), False, LIBRARIES[level]]


def test_the_exit_code_is_the_commands_and_another_level_is_refused() -> None:
    def exit_code(*arguments: str) -> int:
        return subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, timeout=60).returncode

    assert exit_code("avx2", sys.executable, "-c", "raise SystemExit(7)") == 7
    assert exit_code("avx1", "true") == 2 and exit_code("avx2") == 2
