"""Rewards of length by hand, malformed responses included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from nla_megatron.config.schema import RewardConfig
from nla_megatron.errors import ConfigError, MissingFile, RewardError
from nla_megatron.rewards import make_reward
from nla_megatron.rewards.length import relative_length
from nla_megatron.types import Measured
from tests.support.measured import measured


def term(name: str, seen: Measured, **options: Any) -> list[float]:
    return make_reward(RewardConfig({"one": {"term": name, "options": options}}))(seen, 0).rewards.tolist()


class TestRelative:
    def test_by_hand(self) -> None:
        """Means of the groups: (2 + 4 + 6) / 3 = 4, and 8 alone."""
        seen = measured(["a"] * 4, groups=[0, 0, 0, 1], lengths=[2, 4, 6, 8])
        assert term("length", seen) == [0.5, 0.0, 0.0, 0.0]

    def test_malformed_responses_score_0_and_do_not_enter_the_mean(self) -> None:
        """With the malformed one the mean would be 36 and the second response would gain."""
        seen = measured(["a", "b", None], lengths=[3, 5, 100])
        assert term("length", seen) == [0.25, 0.0, 0.0]
        seen = measured(["a", "b", None], lengths=[30, 50, 1])
        assert term("length", seen) == [0.25, 0.0, 0.0]

    def test_a_task_can_say_what_is_malformed(self) -> None:
        seen = measured(["a", "b", "c"], lengths=[3, 5, 100], format=[1, 1, 0])
        assert term("length", seen, format_value="format") == [0.25, 0.0, 0.0]

    def test_a_group_without_any_form_scores_0(self) -> None:
        assert term("length", measured([None, None, "a"], groups=[0, 0, 1], lengths=[1, 9, 3])) == [0.0] * 3

    def test_a_mean_of_0_scores_0(self) -> None:
        seen = measured(["a", "b"], thinking_tokens=[0, 0])
        assert term("length", seen, unit="value", value="thinking_tokens") == [0.0, 0.0]

    def test_an_empty_response_beside_others_scores_1(self) -> None:
        seen = measured(["a", "b"], thinking_tokens=[0, 6])
        assert term("length", seen, unit="value", value="thinking_tokens") == [1.0, 0.0]

    @given(
        st.lists(st.tuples(st.integers(0, 2), st.integers(0, 500), st.booleans()), min_size=1, max_size=12),
        st.integers(1, 1000),
    )
    def test_the_unit_of_length_does_not_matter(self, rollouts: list[tuple[int, int, bool]], factor: int) -> None:
        groups, lengths, good = (torch.tensor(column) for column in zip(*rollouts, strict=True))
        once = relative_length(lengths.double(), groups, good)
        torch.testing.assert_close(relative_length(factor * lengths.double(), groups, good), once)
        assert ((once >= 0) & (once <= 1)).all()
        for group, length, fine in rollouts:
            own = [n for g, n, f in rollouts if g == group and f]
            mean = sum(own) / len(own) if own else 0
            expected = max(0.0, 1 - length / mean) if fine and mean > 0 else 0.0
            assert float(once[rollouts.index((group, length, fine))]) == pytest.approx(expected, abs=1e-12)

    @given(st.lists(st.integers(1, 300), min_size=1, max_size=8), st.integers(1, 300))
    def test_tokens_added_to_everybody_never_raise_a_score(self, lengths: list[int], more: int) -> None:
        groups, good = torch.zeros(len(lengths), dtype=torch.int64), torch.ones(len(lengths), dtype=torch.bool)
        n_N = torch.tensor(lengths, dtype=torch.float64)
        assert (relative_length(n_N + more, groups, good) <= relative_length(n_N, groups, good) + 1e-12).all()


class TestUnits:
    def test_words_of_the_response_or_of_its_answer(self) -> None:
        seen = measured(["one two  three", "one", None])
        assert term("length_per_token", seen, unit="words", penalty=1.0) == [-3.0, -1.0, -2.0]
        assert term("length_per_token", seen, unit="words", of="answer", penalty=1.0) == [-3.0, -1.0, 0.0]

    def test_tokens_of_a_named_tokenizer(self, tmp_path: Path) -> None:
        """Words and punctuation apart, so that the answer `a-b` has three."""
        tokenizer = Tokenizer(WordLevel({"a": 0, "?": 1}, unk_token="?"))
        tokenizer.pre_tokenizer = Whitespace()
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        options = {"unit": "tokenizer", "of": "answer", "penalty": 1.0}
        for path in (tmp_path, tmp_path / "tokenizer.json"):
            seen = measured(["a-b", "a b", None])
            assert term("length_per_token", seen, tokenizer=str(path), **options) == [-3.0, -2.0, 0.0]

    def test_a_tokenizer_that_is_not_there_is_named_before_the_run(self, tmp_path: Path) -> None:
        with pytest.raises(MissingFile, match="tokenizer.json"):
            make_reward(
                RewardConfig({"length": {"options": {"unit": "tokenizer", "tokenizer": str(tmp_path)}}})
            )  # fmt: skip

    def test_a_value_that_the_task_does_not_measure_is_named(self) -> None:
        with pytest.raises(RewardError, match=r"'length'[\s\S]*'thinking_tokens'[\s\S]*one of correct"):
            term("length", measured(["a"], correct=[1]), unit="value", value="thinking_tokens")

    @pytest.mark.parametrize(
        ("options", "found"),
        [
            ({"unit": "letters"}, "unit='letters'"),
            ({"unit": "value"}, "unit=value with value=None"),
            ({"unit": "tokenizer"}, "unit=tokenizer with tokenizer=None"),
            ({"value": "thinking_tokens"}, "unit=response_tokens with value='thinking_tokens'"),
            ({"of": "prompt"}, "of='prompt'"),
        ],
    )
    def test_units_that_cannot_be_meant_are_refused(self, options: dict[str, Any], found: str) -> None:
        with pytest.raises(ConfigError, match=found):
            term("length", measured(["a"]), **options)


class TestPenalties:
    def test_the_hinge_by_hand(self) -> None:
        """Free up to 150 - 64 = 86; then a hundredth each, of malformed responses too."""
        seen = measured(["a", "a", "a", None], lengths=[1, 86, 87, 150])
        assert term("length_hinge", seen, cap=150) == pytest.approx([0.0, 0.0, -0.01, -0.64])

    def test_per_token_by_hand(self) -> None:
        assert term("length_per_token", measured(["a", None], lengths=[7, 150])) == pytest.approx([-0.007, -0.15])

    def test_overlong_shaping_by_hand(self) -> None:
        """From 0 at 16 to -1 at 20."""
        seen = measured(["a"] * 5 + [None], lengths=[1, 16, 17, 19, 20, 21])
        assert term("overlong", seen, cap=20, buffer=4) == [0.0, 0.0, -0.25, -0.75, -1.0, -1.0]

    @pytest.mark.parametrize(
        ("name", "options", "found"),
        [
            ("length_hinge", {}, "no value for reward.terms.one.options.cap"),
            ("length_hinge", {"cap": 10}, "margin=64 with cap=10"),
            ("length_hinge", {"cap": 100, "penalty": -0.1}, "penalty=-0.1"),
            ("length_per_token", {"penalty": -0.1}, "penalty=-0.1"),
            ("overlong", {"cap": 10, "buffer": 11}, "buffer=11 with cap=10"),
            ("overlong", {"cap": 10, "buffer": 0}, "buffer=0"),
        ],
    )
    def test_options_that_cannot_be_meant_are_refused(self, name: str, options: dict[str, Any], found: str) -> None:
        with pytest.raises(ConfigError, match=found):
            term(name, measured(["a"]), **options)
