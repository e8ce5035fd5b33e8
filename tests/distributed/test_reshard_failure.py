"""A rank that fails in the middle of a load: all end, soon and with one message, and no engine generates any more."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.ranks import start_ranks, wait_for

pytestmark = pytest.mark.slow

BOUND_SECONDS = 60  # far below what a collective would wait for a rank that is gone


@pytest.mark.parametrize("how", ["raises", "killed"])
def test_a_rank_lost_in_mid_load_ends_all_and_leaves_no_engine_that_generates(tmp_path: Path, how: str) -> None:
    child = start_ranks("reshard_failing_worker", 4, str(tmp_path), how)
    wait_for(tmp_path / "failed", child)
    done = child.wait(BOUND_SECONDS)
    assert done.returncode != 0
    assert "past the failure" not in done.stdout
    told = [
        line.partition(":")[0] for line in done.stderr.splitlines() if "Error: the memory" in line or "Lost: " in line
    ]
    if how == "raises":
        assert told == ["RuntimeError"]
        assert done.stderr.count("Traceback") == 1
    else:
        # Nobody can speak for a rank that was killed: the first of the others to miss it does.
        assert told == ["PeerLost"]
        assert "Traceback" not in done.stderr
    # Its peer in the exchange was in mid-load too.
    survivors = {path.name: path.read_text() for path in tmp_path.glob("rank*")}
    assert "rank3" in survivors
    assert set(survivors.values()) == {"HalfLoaded: a load of weights did not finish"}
