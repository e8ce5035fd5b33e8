"""Lexical richness by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nla_megatron.config.schema import RewardConfig
from nla_megatron.errors import ConfigError
from nla_megatron.rewards import make_reward
from tests.support.measured import measured


def rewards(texts: list[str | None], **options: float) -> list[float]:
    config = RewardConfig({"lexical_richness": {"options": options}})
    return make_reward(config)(measured(texts), 0).rewards.tolist()


def test_by_hand() -> None:
    """Of 4 words 3 differ, and 76 of 80 are missing; 80 words of 2 kinds lack nothing; nothing lacks everything."""
    texts = ["The cat, the dog", "a b " * 40, "x " * 160, "", " \n", None]
    expected = [3 / 4 - 76 / 80, 2 / 80, 1 / 160, -1.0, -1.0, -1.0]
    assert rewards(texts) == pytest.approx(expected, abs=1e-7)


def test_the_penalty_has_a_scale() -> None:
    assert rewards(["a b", None], brevity_penalty_scale=0.0) == [1.0, 0.0]
    assert rewards(["a b", None], brevity_penalty_scale=0.5) == pytest.approx([1 - 0.5 * 78 / 80, -0.5])
    assert rewards(["a b", "a"], words=2) == [1.0, 0.5]


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=100))
def test_order_and_case_do_not_matter(words: list[str]) -> None:
    shuffled = sorted(words)
    assert rewards([" ".join(words)]) == rewards(["\n".join(shuffled).upper()])


def test_no_words_at_all_cannot_be_asked_for() -> None:
    with pytest.raises(ConfigError, match="words=0"):
        rewards(["a"], words=0)
