"""Splits by document: rows of one document are near-duplicates, so they always fall on the same side.

A document's place depends on its id (and a seed) alone: not on order, sharding, or on what other documents exist.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

from nla_megatron.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

_TOLERANCE = 1e-6


def held_out(doc_id: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out set, about `fraction` of all documents.

    The set only grows with the fraction, so a document held out at 1 % is also held out at 5 %.

    Raises:
        ConfigError: `fraction` is not in [0, 1).
    """
    if not 0.0 <= fraction < 1.0:
        raise ConfigError(f"held-out fraction {fraction}", "a number from 0 to below 1", "set it to, say, 0.01")
    return _uniform(f"held_out\0{doc_id}") < fraction


def assign_split(doc_id: str, fractions: Mapping[str, float], seed: int) -> str:
    """The split of a document that is not held out.

    Args:
        doc_id: `"{corpus}:{split}:{index}"`.
        fractions: share of each split; positive, with sum 1 (within 1e-6). The order of the keys does not matter.
        seed: another seed shuffles the documents anew.

    Raises:
        ConfigError: fractions that are empty, not positive, not finite, or do not sum to 1.
    """
    _check(fractions)
    names = sorted(fractions)
    draw = _uniform(f"split\0{seed}\0{doc_id}") * math.fsum(fractions.values())
    edge = 0.0
    for name in names[:-1]:
        edge += fractions[name]
        if draw < edge:
            return name
    return names[-1]


def _check(fractions: Mapping[str, float]) -> None:
    remedy = "give each split a positive share, for example {av_sft: 0.25, ar_sft: 0.25, rl: 0.5}"
    for name, share in fractions.items():
        if not (math.isfinite(share) and share > 0):
            raise ConfigError(f"split {name!r} has the fraction {share}", "a positive number", remedy)
    total = math.fsum(fractions.values())
    if abs(total - 1.0) > _TOLERANCE:
        raise ConfigError(f"split fractions {dict(fractions)} with sum {total:g}", "a sum of 1", remedy)


def _uniform(key: str) -> float:
    """A number in [0, 1) from a stable hash; 53 bits, so that it never rounds up to 1."""
    return (int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 11) / 2**53
