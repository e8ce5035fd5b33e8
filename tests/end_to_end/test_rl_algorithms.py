"""`rl` with everything that remembers: a critic, a moving reference and reward, prompts that are drawn again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from nla_megatron.errors import ProviderError
from tests.support.messages_server import MessagesServer, Reply
from tests.support.ranks import command
from tests.support.remembered import DECAY, coarse
from tests.support.tiny import tiny_model

pytestmark = pytest.mark.slow
STEPS, PROMPTS, SAMPLES, ROUNDS = 4, 3, 3, 2
COMMON = (
    f"batch_size={PROMPTS}", f"samples_per_prompt={SAMPLES}", "micro_batch_size=4", "rollout.max_new_tokens=8",
    "rollout.cpu_kv_cache_gib=0.05", "rollout.max_logprob_gap=1e-3", "optim.lr=1e-3", "optim.warmup_steps=0",
    "task=lexical",
)  # fmt: skip
ALONE = ("reward=lexical", "~reward.terms.lexical_richness")
REMEMBERED = (*ALONE, "+reward.terms.mine.term='tests.support.remembered:Remembered'")
PPO = (
    *REMEMBERED, "algorithm=ppo", "algorithm.reference=ema", "algorithm.reference_decay=0.9", "algorithm.kl_coef=0.1",
    f"algorithm.dynamic_sampling={ROUNDS}", "critic_optim.lr=1e-3", "critic_optim.warmup_steps=0",
)  # fmt: skip
EMA = ("reward=lexical", "algorithm=reinforce_ema")
SCST = ("reward=lexical", "algorithm=scst")
KEPT = ("save_every=1", "keep_checkpoints=9", "rollout.record=true")
COMPARED = (
    "reward", "policy_loss", "kl", "kl_in_reward", "entropy", "policy_grad_norm", "critic_loss", "critic_grad_norm",
    "value", "explained_variance",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"), max_positions=512)


@pytest.fixture(scope="module")
def straight(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(model, tmp_path_factory.mktemp("straight") / "rl", *PPO, *KEPT, f"steps={STEPS}")


def train(model: Path, out: Path, *overrides: str) -> Path:
    done = command("rl", f"model={model}", f"out={out}", *COMMON, *overrides)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return out


def metrics(run: Path) -> list[dict[str, Any]]:
    kept = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("seconds_")} for line in kept]


def rollouts(run: Path, step: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rollouts" / f"step_{step:08d}.jsonl").read_text().splitlines()]


def memory(run: Path, steps: int) -> dict[str, dict[str, float]]:
    state = json.loads((run / "checkpoints" / f"step_{steps:08d}" / "state.json").read_text())
    found: dict[str, dict[str, float]] = state["memory"]
    return found


def cut(run: Path, out: Path, steps: int) -> Path:
    """What a kill in the step after `steps` leaves."""
    shutil.copytree(run, out, ignore=shutil.ignore_patterns("hf", "done"))
    for checkpoint in (out / "checkpoints").glob("step_*"):
        if int(checkpoint.name.removeprefix("step_")) > steps:
            shutil.rmtree(checkpoint)
    return out


def same_end(one: Path, other: Path) -> None:
    assert metrics(one) == metrics(other)
    here, there = (load_file(run / "hf" / "model.safetensors") for run in (one, other))
    assert all(bool((here[name] == there[name]).all()) for name in there)


def test_prompts_whose_samples_are_all_alike_are_drawn_again(straight: Path) -> None:
    lines = metrics(straight)
    assert any(line["replaced_prompts"] for line in lines) and any(line["sampling_rounds"] > 1 for line in lines)
    for step, line in enumerate(lines):
        groups: dict[int, set[float]] = {}
        for rollout in rollouts(straight, step):
            groups.setdefault(rollout["group"], set()).add(coarse(rollout["text"]))
        assert sorted(groups) == list(range(PROMPTS)) and len(rollouts(straight, step)) == PROMPTS * SAMPLES
        assert line["sampling_rounds"] == 1 + ROUNDS or all(len(rewards) == 2 for rewards in groups.values())


def test_a_moving_reward_follows_what_steps_learned_from_and_nothing_else(straight: Path) -> None:
    average = 0.0
    for step, line in enumerate(metrics(straight)):
        found = [coarse(rollout["text"]) for rollout in rollouts(straight, step)]
        mean = sum(found) / len(found)
        assert line["reward"] == pytest.approx(mean - average, abs=1e-6)
        average = DECAY * average + (1 - DECAY) * mean
        assert memory(straight, step + 1)["reward"]["mine/average"] == pytest.approx(average, abs=1e-12)


def test_critic_reference_and_reward_resume_to_the_bit(model: Path, straight: Path, tmp_path: Path) -> None:
    lines = metrics(straight)
    assert all(line["critic_grad_norm"] > 0 for line in lines) and lines[-1]["kl"] != 0 and lines[-1]["value"] != 0
    run = cut(straight, tmp_path / "rl", 2)
    same_end(train(model, run, *PPO, *KEPT, f"steps={STEPS}"), straight)
    assert memory(run, STEPS) == memory(straight, STEPS)


def test_a_moving_baseline_resumes_to_the_bit(model: Path, tmp_path: Path) -> None:
    straight = train(model, tmp_path / "straight", *EMA, *KEPT, "steps=3")
    averages = [memory(straight, step)["algorithm"]["average"] for step in (1, 2)]
    assert metrics(straight)[2]["baseline"] == pytest.approx(averages[1]) and averages[0] != averages[1]
    same_end(train(model, cut(straight, tmp_path / "rl", 2), *EMA, *KEPT, "steps=3"), straight)


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_layouts_give_the_numbers_of_one_process(model: Path, straight: Path, tmp_path: Path, layout: str) -> None:
    """Also of the steps whose prompts were drawn again: what is replayed is what was learned from."""
    replay = (f"rollout.replay={straight}", f"parallel={layout}", "rollout=tp2")
    spread = metrics(train(model, tmp_path / "rl", *PPO, *replay, f"steps={STEPS}", "export=false"))
    for alone, there in zip(metrics(straight), spread, strict=True):
        assert there["reward"] == alone["reward"]
        for key in COMPARED:
            assert there[key] == pytest.approx(alone[key], rel=1e-3, abs=2e-5), key
        for count in ("injected", "truncated", "response_length"):
            assert there[count] == alone[count] or alone["sampling_rounds"] > 1


def test_ranks_draw_again_together(model: Path, straight: Path, tmp_path: Path) -> None:
    """Sampled and not replayed: the first step of two ranks is that of one, replaced prompts too."""
    run = train(model, tmp_path / "rl", *PPO, "parallel=tp2", "rollout=tp2", "rollout.record=true", "steps=4")
    for step in range(STEPS):
        ids = [[rollout["response_ids"] for rollout in rollouts(each, step)] for each in (run, straight)]
        if ids[0] == ids[1]:
            assert metrics(run)[step]["replaced_prompts"] == metrics(straight)[step]["replaced_prompts"]
    assert [metrics(run)[0][key] for key in ("sampling_rounds", "replaced_prompts")] == [
        metrics(straight)[0][key] for key in ("sampling_rounds", "replaced_prompts")
    ]


def test_greedy_responses_are_a_baseline_also_of_what_is_replayed(model: Path, tmp_path: Path) -> None:
    first = train(model, tmp_path / "first", *SCST, "rollout.record=true", "steps=2", "export=false")
    again = train(model, tmp_path / "again", *SCST, f"rollout.replay={first}", "steps=2", "export=false")
    for one, other in zip(metrics(first), metrics(again), strict=True):
        assert one["baseline"] != 0 and one["baseline"] != one["reward"]
        assert other["baseline"] == pytest.approx(one["baseline"], abs=1e-6)
        assert other["policy_loss"] == pytest.approx(one["policy_loss"], abs=1e-5)


def test_a_judge_that_refuses_ends_all_ranks_with_one_message(model: Path, tmp_path: Path) -> None:
    """One rank asks; the others wait for what it says, and must not wait for ever."""
    with MessagesServer(lambda request: Reply("no such key", status=401)) as server:
        options = {"rubric": "good", "base_url": f"'{server.base_url}'"}
        judge = (*ALONE, *(f"+reward.terms.judge.options.{key}={value}" for key, value in options.items()))
        done = command(
            "rl", f"model={model}", f"out={tmp_path / 'rl'}", *COMMON, *judge, "steps=1", "parallel=tp2", "rollout=tp2",
            timeout=120, ANTHROPIC_API_KEY="test-key",
        )  # fmt: skip
    assert done.returncode == ProviderError.exit_code
    assert done.stderr.count("ProviderError: ") == 1 and "401" in done.stderr and "Traceback" not in done.stderr
    assert server.received and not (tmp_path / "rl" / "done").exists()
