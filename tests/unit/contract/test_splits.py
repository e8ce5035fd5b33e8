from __future__ import annotations

import hashlib
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nla_megatron.contract.splits import assign_split, held_out
from nla_megatron.errors import ConfigError

FRACTIONS = {"av_sft": 0.25, "ar_sft": 0.25, "rl": 0.5}
DOCUMENTS = [f"corpus:train:{i}" for i in range(8000)]


def test_rows_of_one_document_never_cross_splits() -> None:
    rows = [doc for doc in DOCUMENTS[:200] for _ in range(10)]
    places = {(doc, assign_split(doc, FRACTIONS, 3), held_out(doc, 0.1)) for doc in rows}
    assert len(places) == 200


def test_shares_are_those_asked_for() -> None:
    counts = Counter(assign_split(doc, FRACTIONS, 0) for doc in DOCUMENTS)
    for name, share in FRACTIONS.items():
        assert counts[name] / len(DOCUMENTS) == pytest.approx(share, abs=0.02)  # 4 standard deviations
    assert sum(held_out(doc, 0.05) for doc in DOCUMENTS) / len(DOCUMENTS) == pytest.approx(0.05, abs=0.01)


def test_the_held_out_set_does_not_lean_on_the_split() -> None:
    kept = [doc for doc in DOCUMENTS if not held_out(doc, 0.3)]
    counts = Counter(assign_split(doc, FRACTIONS, 0) for doc in kept)
    assert counts["rl"] / len(kept) == pytest.approx(0.5, abs=0.03)


def test_places_are_fixed_for_ever() -> None:
    """Computed here from the definition, so that a change of hash, which would leak held-out rows, is seen."""
    for doc in DOCUMENTS[:50]:
        draw = int(hashlib.sha256(f"held_out\0{doc}".encode()).hexdigest()[:16], 16) / 2**64
        assert held_out(doc, 0.4) == (draw < 0.4)
        draw = int(hashlib.sha256(f"split\x007\0{doc}".encode()).hexdigest()[:16], 16) / 2**64
        expected = "ar_sft" if draw < 0.25 else "av_sft" if draw < 0.5 else "rl"
        assert assign_split(doc, FRACTIONS, 7) == expected


@given(st.text(), st.floats(0, 0.99), st.floats(0, 0.99))
def test_the_held_out_set_only_grows_with_its_fraction(doc: str, a: float, b: float) -> None:
    small, large = sorted((a, b))
    assert held_out(doc, large) or not held_out(doc, small)


@given(st.text(), st.integers(0, 5))
def test_the_order_of_the_fractions_does_not_matter(doc: str, seed: int) -> None:
    assert assign_split(doc, FRACTIONS, seed) == assign_split(doc, dict(reversed(FRACTIONS.items())), seed)


def test_another_seed_is_another_split() -> None:
    moved = sum(assign_split(doc, FRACTIONS, 0) != assign_split(doc, FRACTIONS, 1) for doc in DOCUMENTS[:1000])
    assert 500 < moved < 750  # independent draws agree with probability 3/8


@pytest.mark.parametrize(
    "fractions",
    [{}, {"a": 0.5, "b": 0.49}, {"a": 1.5, "b": -0.5}, {"a": 1.0, "b": 0.0}, {"a": float("nan")}],
)
def test_bad_fractions_are_refused(fractions: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="split"):
        assign_split("d", fractions, 0)


def test_rounding_in_the_sum_is_tolerated() -> None:
    assert assign_split("d", {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3 + 5e-7}, 0) in {"a", "b", "c"}


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_bad_held_out_fraction_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match="held-out"):
        held_out("d", fraction)
