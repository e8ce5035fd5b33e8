"""What the ranks say of one batch becomes one batch, or names the rank that is wrong."""

from __future__ import annotations

import pytest

from nla_megatron.errors import InjectionError, RolloutError
from nla_megatron.rollout.accounting import agreed
from nla_megatron.types import Rollout


def rollout(group: int, sample: int) -> Rollout:
    return Rollout(group, sample, 0, (1, 2), (3,), (-0.5,), "three", True)


FIRST, SECOND = [rollout(2, 0), rollout(0, 1)], [rollout(0, 0), rollout(1, 0)]


def test_the_replicas_share_of_a_batch_is_taken_once_and_put_in_order() -> None:
    everyone = [("a", [], FIRST), ("a", [], None), ("b", [], SECOND), ("b", [], None)]
    found = agreed(everyone, 2, 4)
    assert [(one.group, one.sample) for one in found.rollouts] == [(0, 0), (0, 1), (1, 0), (2, 0)]
    assert (found.injections.injected, found.injections.expected) == (4, 4)


def test_ranks_of_one_replica_that_sampled_differently_are_named() -> None:
    with pytest.raises(RolloutError, match="rank 3 holds other rollouts than rank 2"):
        agreed([("a", [], FIRST), ("a", [], None), ("b", [], SECOND), ("a", [], None)], 2, 4)


def test_a_request_that_went_wrong_on_any_rank_is_told_before_what_follows_from_it() -> None:
    with pytest.raises(InjectionError, match="1 of 4 requests on rank 1 .* group 2: missed"):
        agreed([("a", [], FIRST), ("b", ["group 2: missed"], None)], 2, 4)


def test_a_rollout_that_got_lost_is_noticed() -> None:
    with pytest.raises(RolloutError, match="2 rollouts"):
        agreed([("a", [], FIRST), ("a", [], None)], 2, 4)
