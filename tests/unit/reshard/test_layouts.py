"""Random training layouts onto vLLM's own: every element claimed once, and as many bytes sent as are not there yet."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nla_megatron.conversion.families import FAMILIES
from nla_megatron.errors import LayoutError
from nla_megatron.reshard.carriers import Claim, Need, Sampler
from nla_megatron.reshard.megatron_side import TrainLayout, claims_of, tensors_of
from nla_megatron.reshard.plan import check_claims, compile_plan, world_bytes
from nla_megatron.reshard.regions import Region
from nla_megatron.reshard.resharder import samplers_of
from nla_megatron.reshard.vllm_side import Trace, trace
from tests.support.reshard import vllm_config_of
from tests.support.reshard_models import shape_of

SHAPE = shape_of("qwen3-moe")
SHAPES = tensors_of(SHAPE)
STAGING = 1 << 14
Traces = dict[tuple[int, bool], list[Trace]]


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Traces:
    directory = tmp_path_factory.mktemp("config")
    (directory / "config.json").write_text(json.dumps(FAMILIES[SHAPE.family].config_from_shape(SHAPE)))
    config = vllm_config_of(directory)
    return {
        (tp, shared): [trace(config, SHAPES, rank, tp, shared) for rank in range(tp)]
        for tp in (1, 2, 4)
        for shared in (False, True)
    }


@st.composite
def grids(draw: st.DrawFn) -> TrainLayout:
    size = st.sampled_from([1, 2, 4])
    pp = draw(st.sampled_from([1, 2, 3]))
    vpp = draw(st.sampled_from([1, 2])) if 1 < pp < 3 else 1
    cuts = sorted(draw(st.sets(st.integers(1, 4), min_size=pp * vpp - 1, max_size=pp * vpp - 1)))
    stages = tuple(stop - start for start, stop in zip([0, *cuts], [*cuts, SHAPE.num_layers], strict=True))
    tp, dp = draw(size), draw(size)
    ep = draw(st.sampled_from([one for one in (1, 2, 4) if (tp * dp) % one == 0]))
    etp = draw(st.sampled_from([one for one in (1, 2, 4) if tp * dp % (ep * one) == 0]))
    return TrainLayout(tp, pp, dp, ep, etp, vpp, stages, first=draw(st.sampled_from([0, 0, 4])))


def mask(regions: Sequence[Region]) -> dict[str, np.ndarray]:
    """How often each element of each tensor is in the regions."""
    counts = {name: np.zeros(size, int) for name, size in SHAPES.items()}
    for region in regions:
        counts[region.name][np.ix_(*region.axes)] += 1
    return counts


def missing_bytes(claims: Sequence[Claim], samplers: Sequence[Sampler]) -> int:
    """Counted element by element."""
    total = 0
    for sampler in samplers:
        wanted = mask([need.piece.region for need in sampler.needs])
        for rank in sampler.ranks:
            held = mask([claim.piece.region for claim in claims if rank in claim.group.members])
            total += sum(int((wanted[name] * (held[name] == 0)).sum()) for name in SHAPES)
    return 4 * total


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(layout=grids(), tp=st.sampled_from([1, 2, 4]), shared=st.booleans(), replicas=st.integers(1, 2))
def test_any_layout_is_claimed_once_and_sends_what_is_not_there_yet(
    layout: TrainLayout, tp: int, shared: bool, replicas: int, traces: Traces
) -> None:
    claims = claims_of(SHAPE, layout)
    check_claims(claims)
    assert all((one == 1).all() for one in mask([claim.piece.region for claim in claims]).values())
    samplers = samplers_of(traces[tp, shared], range(replicas * tp))
    world = max(layout.ranks.stop, replicas * tp)
    plans = [compile_plan(claims, samplers, rank, "float32", STAGING) for rank in range(world)]
    bound = missing_bytes(claims, samplers)
    assert sum(plan.bytes_sent for plan in plans) == sum(plan.bytes_received for plan in plans) == bound
    needed, local = world_bytes(claims, samplers, "float32")
    assert needed - local == bound
    assert max(plan.staging for plan in plans) <= STAGING


def test_work_for_a_plan_grows_with_its_tensors() -> None:
    counted: list[int] = []
    for blocks in (4, 8, 16):
        shape = replace(SHAPE, num_layers=blocks)
        needs = claims_of(shape, TrainLayout(tp=4, etp=4))
        samplers = [_all_of(needs, rank) for rank in range(4)]
        asked = 0

        def count(*event: Any) -> None:
            nonlocal asked
            asked += 1

        sys.setprofile(count)
        claims = claims_of(shape, TrainLayout(tp=2, pp=2, dp=4, ep=2, etp=1))
        check_claims(claims)
        compile_plan(claims, samplers, 0, "float32", STAGING)
        sys.setprofile(None)
        counted.append(asked)
    # Twice the blocks cost twice the calls.
    assert 1.9 < (counted[2] - counted[1]) / (counted[1] - counted[0]) < 2.1


def _all_of(needs: Sequence[Claim], rank: int) -> Sampler:
    return Sampler((rank,), tuple(Need(one.piece, "float32") for one in needs if rank in one.group.members))


@pytest.mark.parametrize(
    "layout", [TrainLayout(dp=3, ep=3), TrainLayout(tp=8, etp=8), TrainLayout(pp=2, stages=(2, 2))]
)
def test_a_layout_that_the_model_does_not_fit_is_refused(layout: TrainLayout) -> None:
    with pytest.raises(LayoutError):
        claims_of(SHAPE, layout)
