"""Start a worker script on several gloo ranks and read what rank 0 found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def environment(**extra: str) -> dict[str, str]:
    """The environment of a child that is nobody's rank yet."""
    inherited = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    }
    return {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CI": "1", **extra}


def torchrun(worker: str, ranks: int, *arguments: str, timeout: float = 500) -> Any:
    """Run `tests/distributed/{worker}.py RESULT arguments…` on `ranks` processes; returns the JSON of rank 0."""
    result = Path(arguments[0]) / f"{worker}.json"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        str(ROOT / "tests" / "distributed" / f"{worker}.py"),
        str(result),
        *arguments,
    ]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-8000:]
    return json.loads(result.read_text())


def command(*arguments: str, timeout: float = 500, **extra: str) -> subprocess.CompletedProcess[str]:
    """`nla-megatron arguments…` as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "nla_megatron", *arguments],
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
    )
