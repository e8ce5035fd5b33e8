"""The same model on TP 1/2 x PP 1/2 (DP filling four ranks) exports, computes and learns what transformers does."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.layouts_worker import EVEN, KEYS
from tests.support.ranks import torchrun


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return torchrun("layouts_worker", 4, str(tmp_path_factory.mktemp("layouts")))


@pytest.mark.parametrize("layout", KEYS)
def test_import_then_export_is_bit_exact(found: Any, layout: str) -> None:
    assert found[layout]["exact"] is True


@pytest.mark.parametrize("layout", KEYS)
def test_injected_logprobs_equal_a_hooked_transformers_model(found: Any, layout: str) -> None:
    assert found[layout]["logprob"] <= 2e-5


@pytest.mark.parametrize("layout", KEYS)
def test_reconstructions_are_the_hidden_states_of_transformers(found: Any, layout: str) -> None:
    assert found[layout]["error"] <= 1e-5


@pytest.mark.parametrize("layout", KEYS)
def test_updates_equal_adamw_on_transformers(found: Any, layout: str) -> None:
    assert found[layout]["loss"] <= 2e-5
    assert found[layout]["norm"] <= 1e-4
    # Adam divides by the gradient's own size: where a gradient is rounding alone, so is the update's direction.
    assert found[layout]["weight"] <= 1e-4


@pytest.mark.parametrize("layout", KEYS)
def test_the_ar_learns_alike_on_every_layout(found: Any, layout: str) -> None:
    single = found[f"{layout.split()[0]} tp1 pp1"]
    assert found[layout]["ar_losses"] == pytest.approx(single["ar_losses"], rel=2e-5)
    assert found[layout]["ar_norms"] == pytest.approx(single["ar_norms"], rel=1e-4)
    assert single["ar_losses"][-1] < single["ar_losses"][0]


@pytest.mark.parametrize("layout", [f"tp{tp} pp{pp}" for tp in (1, 2) for pp in (1, 2)])
def test_bf16_has_bf16_parameters_and_fp32_masters_and_learns(found: Any, layout: str) -> None:
    numbers = found[f"bf16 {layout}"]
    assert numbers["parameters"] == ["torch.bfloat16"] and numbers["masters"] == ["torch.float32"]
    assert numbers["gap"] <= 0.1
    assert numbers["losses"][-1] < numbers["losses"][0]
    assert numbers["losses"] == pytest.approx(found["bf16 tp1 pp1"]["losses"], rel=5e-3)


def test_a_moving_reference_is_the_average_of_the_policies_and_resumes_on_another_layout(found: Any) -> None:
    made, resumed = found["moving tp1 pp1"], found["moving tp2 pp2"]
    assert made["off"] <= 1e-6 and resumed["off"] <= 1e-6
    assert made["moved"] > 1e-5, "the policy is not its average"
    assert resumed["moved"] == 0, "loading the average leaves the policy alone"


@pytest.mark.parametrize("layout", EVEN)
def test_a_policy_with_an_entropy_bonus_learns_what_adamw_on_transformers_does(found: Any, layout: str) -> None:
    """The entropy's gradient crosses the ranks that share the vocabulary; losses and norms of three updates."""
    numbers = found[f"rl {layout}"]
    assert numbers["entropy"] <= 2e-5
    assert numbers["policy_loss"] <= 2e-5
    assert numbers["policy_norm"] <= 1e-4


@pytest.mark.parametrize("layout", EVEN)
def test_a_critic_learns_what_a_head_on_transformers_does(found: Any, layout: str) -> None:
    numbers = found[f"rl {layout}"]
    assert numbers["value_size"] > 10 * numbers["value"] and numbers["value"] <= 2e-5
    assert numbers["critic_loss"] <= 2e-5
    assert numbers["critic_norm"] <= 1e-4
