"""Every algorithm preset gives the numbers of one process at TP 2 and at PP 2, on plain text or on activations.

All of `rl`'s trainer runs: rewards, AR, critic, reference, greedy baseline, minibatches. Only vLLM is left out: the
same responses are written on every layout, whatever the policy learns. `tests/end_to_end/test_rl_layouts.py` has it in.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nla_megatron.config.compose import compose
from nla_megatron.config.schema import AlgorithmConfig
from nla_megatron.conversion.projections import PROJECTION_FILE
from tests.support.credited import CASES, LAYOUTS, PROJECTED, RUNS, SAMPLES, SPREAD, TASKS, out_of, overrides
from tests.support.ranks import torchrun

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
Found = dict[str, list[dict[str, float]]]
WEIGHTS = {"lexical": ("hf",), "nla": ("av", "ar")}
"""Where a run's directory has the weights that learned, the policy's first."""
spread_run = pytest.mark.parametrize(("run", "layout"), SPREAD)
every_run = pytest.mark.parametrize(("case", "task"), RUNS)
every_task = pytest.mark.parametrize("task", TASKS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("algorithms")


@pytest.fixture(scope="module")
def alone(folder: Path) -> Any:
    """Scalars of the steps of each run in one process."""
    return torchrun("algorithms_worker", LAYOUTS["single"], str(folder), "single", timeout=700)


@pytest.fixture(scope="module")
def spread(alone: Found, folder: Path) -> dict[str, Found]:
    """The same on several ranks, by layout; the files that they read are those of the process alone."""
    return {
        layout: torchrun("algorithms_worker", LAYOUTS[layout], str(folder), layout, timeout=700)
        for layout in dict.fromkeys(layout for _, layout in SPREAD)
    }


@cache
def tensors(file: Path) -> dict[str, Tensor]:
    return load_file(file)


def weights(folder: Path, layout: str, case: str, task: str) -> dict[str, Tensor]:
    """All that learned, as Hugging Face tensors."""
    run = out_of(folder, layout, case, task)
    parts = {part: tensors(run / part / "model.safetensors") for part in WEIGHTS[task]}
    if task == "nla":
        parts["head"] = tensors(run / "ar" / "value_head.safetensors")
    if case in PROJECTED:
        parts["projection"] = tensors(run / "av" / PROJECTION_FILE)
    return {f"{part}.{name}": each for part, found in parts.items() for name, each in found.items()}


def off(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The share of all elements that differ by a tenth of an update at least."""
    assert set(one) == set(other)
    apart = sum(int(((one[name] - other[name]).abs() > 1e-4).sum()) for name in one)
    return apart / sum(each.numel() for each in one.values())


def algorithm_of(folder: Path, case: str, task: str) -> AlgorithmConfig:
    config: AlgorithmConfig = compose("rl", overrides(folder, "single", case, task)).algorithm
    return config


@spread_run
def test_steps_have_the_numbers_of_a_single_process(
    alone: Found, spread: dict[str, Found], run: tuple[str, str], layout: str
) -> None:
    for one, other in zip(alone[" ".join(run)], spread[layout][" ".join(run)], strict=True):
        assert set(one) == set(other)
        for name, value in one.items():
            assert other[name] == pytest.approx(value, rel=2e-4, abs=2e-5), name


@spread_run
def test_weights_are_those_of_a_single_process(
    spread: dict[str, Found], folder: Path, run: tuple[str, str], layout: str
) -> None:
    # Adam's first steps have the gradient's sign alone; a gradient that is rounding may go either way by a step's size.
    # Here no element was further off than 1e-4.
    assert off(weights(folder, layout, *run), weights(folder, "single", *run)) <= 1e-3


@spread_run
def test_the_next_steps_credit_is_that_of_a_single_process(
    spread: dict[str, Found], folder: Path, run: tuple[str, str], layout: str
) -> None:
    """Rewards, log-probs of policy and reference, values, returns and advantages, token by token."""
    one, other = (tensors(out_of(folder, name, *run) / "sampled.safetensors") for name in ("single", layout))
    assert set(one) == set(other)
    for name, values in one.items():
        assert torch.allclose(other[name].double(), values.double(), rtol=2e-4, atol=1e-4), name


@every_run
def test_every_run_learns(alone: Found, folder: Path, case: str, task: str) -> None:
    steps, config = alone[f"{case} {task}"], algorithm_of(folder, case, task)
    start = {f"hf.{name}": each for name, each in tensors(folder / "model" / "model.safetensors").items()}
    learned = weights(folder, "single", case, task)
    policy = {f"hf.{name.split('.', 1)[1]}": each for name, each in learned.items() if name[:2] in ("hf", "av")}
    assert off(start, policy) > 0.5
    assert all(step["reward_std"] > 0 and not step["skipped"] for step in steps)
    if config.kl_coef > 0:
        assert abs(steps[-1]["kl_in_reward" if config.kl_in == "reward" else "kl"]) > 1e-4
    if config.name == "ppo":
        assert abs(steps[-1]["value"]) > 1e-4 and all(step["critic_grad_norm"] > 0 for step in steps)
    if case in PROJECTED:
        taught = {f"projection.{name}": each for name, each in tensors(folder / "projecting" / PROJECTION_FILE).items()}
        assert off(taught, {name: learned[name] for name in taught}) > 0.5
    if task == "nla":
        assert all(step["ar_grad_norm"] > 0 and step["extraction_failed"] < 1 for step in steps)
        assert any(step["extraction_failed"] > 0 for step in steps)
    if case in ("ppo", "grpo several", "gspo several", "rloo several"):
        assert any(step["clipped"] > 0 for step in steps)


@every_task
def test_no_two_of_them_learn_the_same(alone: Found, folder: Path, task: str) -> None:
    """By the measure of the layouts, which must be the same."""
    cases = [case for case in CASES if (case, task) in RUNS]
    [policy, *_] = WEIGHTS[task]
    found = {case: tensors(out_of(folder, "single", case, task) / policy / "model.safetensors") for case in cases}
    same = [pair for pair in combinations(cases, 2) if off(found[pair[0]], found[pair[1]]) <= 1e-2]
    # With one update of a step every ratio is 1: what these two do with it, and a KL of 0.01, is too little to see.
    assert same == [("cispo", "grpo")]


@every_task
def test_what_single_presets_are_about_happens(alone: Found, folder: Path, task: str) -> None:
    flat = [step["flat_groups"] for step in alone[f"grpo {task}"]]
    assert max(flat) > 0
    assert sum(step["replaced_prompts"] for step in alone[f"dapo {task}"]) > 0
    average = alone[f"reinforce_ema {task}"][0]["reward"]
    for step in alone[f"reinforce_ema {task}"]:
        assert step["baseline"] == pytest.approx(average, rel=1e-5)
        average = 0.9 * average + 0.1 * step["reward"]
    greedy = tensors(out_of(folder, "single", "scst", task) / "sampled.safetensors")
    assert torch.equal(greedy["greedy"], greedy["greedy"][::SAMPLES].repeat_interleave(SAMPLES))
    assert not torch.equal(greedy["greedy"], greedy["rewards"])
    still, moving = (
        tensors(out_of(folder, "single", case, task) / "sampled.safetensors")["reference"]
        for case in ("reinforce", "reinforce_mean")
    )
    assert torch.equal(still, moving), "the reference that stays does not depend on what was learned"
    moved = tensors(out_of(folder, "single", "grpo moving", task) / "sampled.safetensors")["reference"]
    assert float((moved - still).abs().max()) > 1e-3
