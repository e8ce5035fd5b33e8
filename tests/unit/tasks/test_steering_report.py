"""The comparison of steered with unsteered responses: its numbers by hand, and the page and record that are written."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nla_megatron.tasks.steering_report import Comparison, Side, comparison_page, strength_statistics, write_comparison


def comparison() -> Comparison:
    return Comparison(
        step=7,
        rows=(4, 0, 2),
        samples=(0, 0, 0),
        prompts=("one", "two <b>", "three"),
        figure="richness",
        steered=Side(
            (1.0, 0.5, 0.75), ("a", "<script>", "c"), (4, 6, 5), {"richness": 0.5, "only_here": 1.0}, (1.0, 0, 0.5)
        ),
        plain=Side((0.5, 0.25, 1.0), ("x", "y", "z"), (4, 4, 4), {"richness": 0.25}, (0.25, 0.5, 0)),
        strengths={"block1_feature3": {"mean": 1.5, "std": 0.5, "min": 1.0, "max": 2.0}},
        applied=12,
        failed=0,
    )


def test_the_gain_is_the_mean_paired_difference_with_its_standard_error() -> None:
    numbers = comparison().numbers()
    gains = [0.5, 0.25, -0.25]
    mean = sum(gains) / 3
    assert numbers["eval_reward"] == 0.75 and numbers["eval_reward_plain"] == pytest.approx(1.75 / 3)
    assert numbers["eval_reward_gain"] == pytest.approx(mean)
    variance = sum((gain - mean) ** 2 for gain in gains) / 2
    assert numbers["eval_reward_gain_error"] == pytest.approx(math.sqrt(variance / 3))
    assert (numbers["eval_response_length"], numbers["eval_response_length_plain"]) == (5.0, 4.0)
    assert (numbers["eval_steered_tokens"], numbers["eval_steering_failed"]) == (12.0, 0.0)
    assert (numbers["eval_richness"], numbers["eval_richness_plain"]) == (0.5, 0.25)
    assert "eval_only_here" not in numbers


def test_strengths_are_described_feature_by_feature() -> None:
    values = torch.tensor([[1.0, -2.0], [3.0, -2.0]])
    assert strength_statistics(values, ["a", "b"]) == {
        "a": {"mean": 2.0, "std": 1.0, "min": 1.0, "max": 3.0},
        "b": {"mean": -2.0, "std": 0.0, "min": -2.0, "max": -2.0},
    }


def test_the_page_shows_both_sides_and_escapes_what_the_model_wrote() -> None:
    page = comparison_page(comparison())
    assert "<script>" not in page and "&lt;script&gt;" in page and "two &lt;b&gt;" in page
    assert "<td>reward</td><td class=n>0.75</td><td class=n>0.5833</td>" in page
    assert "block1_feature3" in page and "12 tokens were steered" in page and "after 7 steps" in page


def test_without_rewards_the_rest_is_compared() -> None:
    one = comparison()
    bare = replace(one, steered=replace(one.steered, rewards=None), plain=replace(one.plain, rewards=None))
    assert bare.numbers() == {key: value for key, value in one.numbers().items() if "reward" not in key}
    assert "have no reward" in comparison_page(bare) and "richness" in comparison_page(bare)


def test_record_and_page_are_written_and_the_latest_is_kept(tmp_path: Path) -> None:
    write_comparison(tmp_path, comparison())
    written = json.loads((tmp_path / "step_00000007.json").read_text())
    assert written["numbers"] == pytest.approx(comparison().numbers())
    assert written["steered"]["rewards"] == [1.0, 0.5, 0.75] and written["plain"]["texts"] == ["x", "y", "z"]
    assert (tmp_path / "latest.html").read_text() == (tmp_path / "step_00000007.html").read_text()
