"""Masters in flat parts: every element is claimed where a replica keeps it, once, however the parts are cut."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nla_megatron.conversion.families import rules_of
from nla_megatron.errors import ConfigError
from nla_megatron.reshard.masters import MASTER, claims_of_masters, ranges_on
from nla_megatron.reshard.megatron_side import TrainLayout, claims_of, tensors_of
from nla_megatron.reshard.plan import check_claims
from nla_megatron.reshard.regions import missing, whole
from tests.support.families import family_shape

LAYOUTS = [TrainLayout(tp=2, dp=3, etp=2), TrainLayout(pp=2, dp=2, ep=2), TrainLayout(tp=2, pp=2, dp=2, etp=1, ep=2)]


@settings(max_examples=15)
@given(st.sampled_from(LAYOUTS), st.integers(0, 1 << 32))
def test_every_element_is_claimed_once_where_its_replica_keeps_it(layout: TrainLayout, seed: int) -> None:
    shape, draw = family_shape("qwen3-moe"), np.random.default_rng(seed)
    claims, rules = claims_of(shape, layout), {rule.megatron: rule for rule in rules_of(shape, True)}
    ranges: list[dict[str, tuple[int, int]]] = [{} for _ in layout.ranks]
    by_group = {(claim.piece.buffer, claim.group.ranks): claim for claim in claims}
    frozen = "decoder.layers.0.self_attention.linear_qkv.weight"
    for name, ranks in by_group:
        rule = rules[name]
        tp = 1 if rule.tp_axis is None else layout.tp if rule.expert is None else layout.etp
        size = int(np.prod(rule.local_view(tp)))
        cuts = [0, *sorted(draw.integers(0, size + 1, len(ranks) - 1).tolist()), size]
        for rank, ends in zip(ranks, itertools.pairwise(cuts), strict=True):
            if ends[0] < ends[1] and name != frozen:
                ranges[rank][name] = ends
    found = claims_of_masters(claims, ranges)
    check_claims(found)
    for name, size in tensors_of(shape).items():
        assert missing(whole(name, size), [one.piece.region for one in found if one.piece.region.name == name]) == []
    for claim in found:
        place = claim.piece.offset + sum(
            (len(axis) - 1) * step for axis, step in zip(claim.piece.region.axes, claim.piece.strides, strict=True)
        )
        if claim.piece.buffer == frozen:
            assert claim.dtype is None
            continue
        [rank] = claim.group.ranks
        start, stop = ranges[rank][claim.piece.buffer.removeprefix(MASTER)]
        assert claim.dtype == "float32" and 0 <= claim.piece.offset <= place < stop - start
    numbers = Counter({(one.group.number, one.group.ranks) for one in found})
    assert len({number for number, _ in numbers}) == len(numbers)


def test_an_optimizer_that_does_not_share_its_masters_out_is_refused() -> None:
    with pytest.raises(ConfigError, match="masters of list"):
        ranges_on(None, [])
