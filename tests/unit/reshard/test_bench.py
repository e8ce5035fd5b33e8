"""The benchmark's copies for a GPU: all of a rank's parameters, each element once; no GPU is told."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nla_megatron.reshard.copies import Copy
from tests.support.ranks import ROOT
from tests.support.reshard import do
from tests.support.tiny import SHAPE

BENCH: dict[str, Any] = runpy.run_path(str(ROOT / "tools" / "bench_reshard.py"))


def test_the_copies_of_a_plan_file_fill_every_parameter_once(tmp_path: Path) -> None:
    BENCH["write_local_copies"](tmp_path / "copies.json", SHAPE, 2)
    known = json.loads((tmp_path / "copies.json").read_text())
    # Every element of a source has a number of its own, so that none can arrive twice.
    ends = np.cumsum([0, *known["sources"].values()])
    sources = {
        name: np.arange(start, start + size) + 1
        for (name, size), start in zip(known["sources"].items(), ends, strict=False)
    }
    targets = {name: np.zeros(size, int) for name, size in known["targets"].items()}
    for copy in known["copies"]:
        do(Copy(*(tuple(one) if isinstance(one, list) else one for one in copy)), sources, targets)
    arrived = np.concatenate(list(targets.values()))
    assert arrived.min() > 0 and len(np.unique(arrived)) == len(arrived)
    # Half of the matrices and all norms, counted by hand; the output layer is the embedding, of whose 600 rows the
    # first of two ranks has 320 on both sides.
    block = (2 * 4 * 32 + 2 * 2 * 32 + 3 * 96) * 64 // 2 + 2 * 64 + 2 * 32
    assert len(arrived) == 4 * block + 320 * 64 + 64


def test_a_machine_without_a_gpu_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_reshard.py", "--gpu", str(tmp_path / "copies.json")])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert BENCH["main"]() == 2
    assert "ConfigError: --gpu on a machine without a CUDA device" in capsys.readouterr().err
