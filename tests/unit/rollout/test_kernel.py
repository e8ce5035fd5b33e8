"""The Triton kernel, in Triton's interpreter, against the plain formulas; it needs no GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.ranks import ROOT, environment

pytest.importorskip("triton")

SCRIPT = """
import itertools
import torch
from nla_megatron.interventions.maths import FORMULAS, Slots, apply_whole
from nla_megatron.rollout.kernel import launch

torch.manual_seed(0)
T, S, D = 7, 3, 1500  # more than one block of columns, and no multiple of one
for mode, dtype, with_residual in itertools.product(FORMULAS, (torch.float32, torch.bfloat16), (True, False)):
    hidden = torch.randn(T, 2 * D).to(dtype)[:, :D]  # rows with a stride of their own
    residual = torch.randn(T, D).to(dtype) if with_residual else None
    slots = Slots(
        torch.tensor([-1, 2, -1, 0, 2, -1, -1, 1, 1], dtype=torch.int32),  # longer than this batch
        torch.randn(S, D) * 3, torch.rand(S, 1) + 0.5, torch.rand(9) + 0.5,
    )
    stream = hidden if residual is None else hidden + residual
    marks = Slots(slots.slot_T[:T], slots.table_SD, slots.strength_SF, slots.factor_T[:T])
    want = apply_whole(FORMULAS[mode], stream, marks)
    if residual is not None:
        want = (want.float() - residual.float()).to(dtype)
    kept, applied = hidden.clone(), torch.zeros(S, dtype=torch.int64)
    launch(mode, hidden, residual, slots, applied)
    touched = marks.slot_T >= 0
    assert torch.equal(hidden[~touched], kept[~touched]), mode
    # Norms are summed in another order: a bfloat16 of the stream may fall to its neighbour.
    rest = torch.zeros(T, D) if residual is None else residual.float()
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    got, want = (hidden.float() + rest)[touched], (want.float() + rest)[touched]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    assert not torch.equal(hidden[touched], kept[touched]), mode
    assert applied.tolist() == [1, 0, 2], applied
print("alike")
"""


def test_the_kernel_changes_marked_tokens_like_the_formulas_and_no_other() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env=environment(TRITON_INTERPRET="1"),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["alike"]
