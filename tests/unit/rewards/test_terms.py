"""The registry, options, import paths, and what a term may not give."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nla_megatron.config.compose import compose, conf_dir
from nla_megatron.config.schema import RewardConfig
from nla_megatron.errors import ConfigError, RewardError
from nla_megatron.messages import API_KEY_VARIABLE
from nla_megatron.rewards import Term, make_reward, register
from nla_megatron.rewards.terms import checked, registered
from nla_megatron.types import Measured, Scores
from tests.support.measured import measured

OWN = """
from dataclasses import dataclass

import numpy as np
import torch

from nla_megatron.rewards import Term
from nla_megatron.types import Scores

NUMBER = 3


@dataclass(frozen=True)
class Options:
    factor: float = 2.0


class Doubled(Term):
    options: Options

    def __call__(self, measured):
        return self.options.factor * measured.values["correct"]


class Other:
    pass


def letters(measured, most=10):
    return [min(most, len(text or "")) for text in measured.texts]


def array(measured):
    return np.ones(len(measured.texts))


def parts(measured):
    ones = torch.ones(len(measured.texts))
    return Scores(ones, {"half": ones / 2})


def nan(measured):
    return [1.0, float("nan"), float("inf")]


def too_few(measured):
    return [1.0]


def words(measured):
    return list(measured.texts)


def matrix(measured):
    return torch.ones(len(measured.texts), 1)


def asks(measured):
    return [1.0] * len(measured.texts)


asks.once = True
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a user's module on Python's path."""
    (tmp_path / "own_rewards.py").write_text(OWN)
    (tmp_path / "broken_rewards.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("own_rewards", "broken_rewards"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "own_rewards"


SEEN = measured(["one", None, "three"], correct=[1, 0, 1], format=[1, 0, 0.5])


def scores(term: str, seen: Measured = SEEN, **options: Any) -> Scores:
    return make_reward(RewardConfig({"mine": {"term": term, "options": options}}))(seen, 0)


def rewards(term: str, seen: Measured = SEEN, **options: Any) -> list[float]:
    return scores(term, seen, **options).rewards.tolist()


class TestOutcome:
    def test_format_is_whether_there_is_an_answer_or_what_the_task_says(self) -> None:
        assert rewards("format") == [1.0, 0.0, 1.0]
        assert rewards("format", value="format") == [1.0, 0.0, 0.5]

    def test_correctness_is_what_the_task_says(self) -> None:
        assert rewards("correctness") == [1.0, 0.0, 1.0]
        assert rewards("correctness", value="format") == [1.0, 0.0, 0.5]

    def test_what_a_term_reads_is_known_before_the_run(self) -> None:
        terms = {"correctness": {}, "length": {"options": {"unit": "value", "value": "thinking_tokens"}}}
        needs = make_reward(RewardConfig(terms)).needs
        assert needs == {"correctness": ("correct",), "length": ("thinking_tokens",)}


class TestRegistry:
    def test_a_name_is_taken_once(self) -> None:
        holder = registered()["format"].__qualname__
        with pytest.raises(ConfigError, match=rf"a second reward term 'format' \(.*Mine\)[\s\S]*{holder} has it"):

            @register("format")
            class Mine(Term):
                pass

        assert registered()["format"].__qualname__ == holder

    def test_options_must_be_a_dataclass(self) -> None:
        with pytest.raises(ConfigError, match="a dataclass of its options"):

            @register("undescribed")
            class Undescribed(Term):
                options: dict[str, int]

        assert "undescribed" not in registered()

    def test_an_unknown_name_is_refused_with_the_known_ones(self) -> None:
        with pytest.raises(ConfigError, match=r"reward\.terms\.mine\.term='praise'[\s\S]*correctness, format, judge"):
            scores("praise")

    def test_options_of_another_term_are_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"reward\.terms\.mine\.options\.cap[\s\S]*brevity_penalty_scale, words"):
            scores("lexical_richness", cap=3)

    @pytest.mark.parametrize("value", ["some", 1.5, None, [1]])
    def test_an_option_of_another_type_is_refused(self, value: Any) -> None:
        with pytest.raises(ConfigError, match=r"mine\.options\.words: .*[Vv]alue"):
            scores("lexical_richness", words=value)


@pytest.mark.usefixtures("own")
class TestImportPath:
    def test_a_class_is_made_with_its_options(self) -> None:
        assert rewards("own_rewards:Doubled") == [2.0, 0.0, 2.0]
        assert rewards("own_rewards:Doubled", factor=0.5) == [0.5, 0.0, 0.5]

    def test_a_function_gets_what_was_measured_and_its_options(self) -> None:
        assert rewards("own_rewards:letters") == [3.0, 0.0, 5.0]
        assert rewards("own_rewards:letters", most=4) == [3.0, 0.0, 4.0]
        assert rewards("own_rewards:array") == [1.0, 1.0, 1.0]

    def test_parts_are_told_beside_the_term(self) -> None:
        found = scores("own_rewards:parts")
        assert {name: part.tolist() for name, part in found.terms.items()} == {
            "mine": [1.0] * 3,
            "mine/half": [0.5] * 3,
        }

    @pytest.mark.parametrize(
        ("path", "found"),
        [
            ("no_such_package.rewards:Mine", "No module named 'no_such_package'"),
            ("own_rewards:Absent", "no Absent in own_rewards"),
            ("broken_rewards:Mine", "No module named 'no_such_library'"),
            ("own_rewards:", "own_rewards:"),
            ("own rewards:Mine", "an import path such as"),
            ("own_rewards:NUMBER", "which is 3"),
            ("builtins:max", "cannot be called"),
            ("own_rewards:Other", "which is <class 'own_rewards.Other'>"),
        ],
    )
    def test_a_path_that_does_not_lead_to_a_term_is_named_before_the_run(self, path: str, found: str) -> None:
        with pytest.raises(ConfigError) as caught:
            make_reward(RewardConfig({"mine": {"term": path}}))
        assert caught.value.found.startswith(f"reward.terms.mine.term={path!r}")
        assert found in str(caught.value)

    @pytest.mark.parametrize(
        ("path", "options"), [("own_rewards:letters", {"least": 1}), ("own_rewards:Doubled", {"most": 1})]
    )
    def test_options_that_it_does_not_take_are_named_before_the_run(self, path: str, options: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=r"reward\.terms\.mine"):
            make_reward(RewardConfig({"mine": {"term": path, "options": options}}))

    @pytest.mark.parametrize(
        ("name", "found"),
        [
            ("nan", r"term 'mine' gave nan for rollout 1 \(row 0, group 0, sample 1\), 2 of 3 in all"),
            ("too_few", r"term 'mine' gave values of shape \(1,\)\n  expected: \(3,\)"),
            ("matrix", r"term 'mine' gave values of shape \(3, 1\)"),
            ("words", r"own_rewards:words gave \['one', None, 'three'\]"),
        ],
    )
    def test_what_is_not_one_finite_number_per_rollout_is_named(self, name: str, found: str) -> None:
        with pytest.raises(RewardError, match=found):
            scores(f"own_rewards:{name}")


def test_a_task_value_that_is_nan_is_named() -> None:
    with pytest.raises(RewardError, match=r"term 'mine' gave nan for rollout 1 \(row 7, group 1, sample 0\)"):
        scores("correctness", measured(["a", "b"], groups=[0, 1], rows=[5, 7], correct=[1, math.nan]))


@pytest.mark.usefixtures("own")
def test_only_terms_that_say_so_are_computed_once() -> None:
    """The runner stands for one rank's result told to all: here it adds what shows that it was used."""
    computed: list[Scores] = []

    def on_one_rank(compute: Callable[[], Scores]) -> Scores:
        computed.append(compute())
        return Scores(computed[-1].rewards + 10, computed[-1].terms)

    terms = {"asks": {"term": "own_rewards:asks"}, "letters": {"term": "own_rewards:letters"}}
    found = make_reward(RewardConfig(terms), once=on_one_rank)(SEEN, 0)
    assert len(computed) == 1
    assert found.terms["asks"].tolist() == [11.0] * 3 and found.terms["letters"].tolist() == [3.0, 0.0, 5.0]


def test_whatever_a_term_computes_in_rewards_are_fp32() -> None:
    values = torch.tensor([1.0, 1 / 3, 0.0], dtype=torch.float64)
    found = checked(values, SEEN, "mine")
    assert found.dtype == torch.float32 and torch.equal(found, values.float())


def test_the_state_of_each_term_is_kept_under_its_label() -> None:
    """Two averages of the same kind do not mix."""

    @dataclass(frozen=True)
    class CountOptions:
        start: float = 0.0

    class Counter(Term):
        options: CountOptions

        def __init__(self, options: CountOptions):
            super().__init__(options)
            self.count = options.start

        def __call__(self, measured: Measured) -> Tensor:
            self.count += 1
            return torch.full((len(measured.rollouts),), self.count)

        def state(self) -> dict[str, float]:
            return {"count": self.count}

        def load_state(self, state: dict[str, float]) -> None:
            self.count = state["count"]

    from nla_megatron.rewards.composition import Composed

    config = RewardConfig({"a": {}, "b": {}})
    first = Composed(config, {"a": Counter(CountOptions()), "b": Counter(CountOptions(10.0))})
    first(SEEN, 0)
    assert first.state() == {"a/count": 1.0, "b/count": 11.0}
    second = Composed(config, {"a": Counter(CountOptions()), "b": Counter(CountOptions())})
    second.load_state(first.state())
    assert second(SEEN, 0).rewards.tolist() == [2.0 + 12.0] * 3


@pytest.mark.parametrize("path", sorted((conf_dir() / "reward").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_reward_that_is_shipped_can_be_made(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a key in the environment and the one file that a term reads; on values of every name that terms may need."""
    monkeypatch.setenv(API_KEY_VARIABLE, "test-key")
    (tmp_path / "zero_shot.jsonl").write_text('{"row": 0, "correct": 1}')
    file = [f"reward.terms.utilisation.options.file={tmp_path}/zero_shot.jsonl"] * (path.stem == "token_utilisation")
    config = compose("rl", ["out=x", "data=y", f"reward={path.stem}", *file])
    reward = make_reward(config.reward, rows=1)
    if not any(term.once for term in reward.terms.values()):
        values = {name: [1.0, 0.0] for names in reward.needs.values() for name in names}
        assert len(reward(measured(["a", None], **values), 0).rewards) == 2
