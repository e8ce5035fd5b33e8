"""Advantages, losses and gradients against TRL's own trainers, which sample and score with a tiny model."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nla_megatron.types import PolicyTokens, Sampled
from tests.support.sampled import made, per_rollout, random_tokens, total_loss
from tests.support.tiny import tiny_model

GROUP, LENGTH = 4, 6
LENGTHS = (6, 2, 4, 1, 3, 6, 5, 2)
ADVANTAGES = (1.5, -0.5, 0.0, -1.0, 0.3, 2.0, -2.0, -0.3)
CLIPS = {"clip_low": 0.1, "clip_high": 0.2}


@dataclass(frozen=True)
class Trainers:
    """TRL's, built once. `rewards` is what their reward function gives next."""

    grpo: Any
    rloo: Any
    rewards: list[float]


@pytest.fixture(scope="module")
def trl(tmp_path_factory: pytest.TempPathFactory) -> Trainers:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on the version of vLLM, which is not used here
        from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = tmp_path_factory.mktemp("trl")
    tiny_model(directory)
    rewards: list[float] = []

    def build(config: Any, trainer: Any) -> Any:
        arguments = config(
            output_dir=str(directory / "out"), per_device_train_batch_size=2 * GROUP, num_generations=GROUP, beta=0.2,
            max_completion_length=LENGTH, report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
        )  # fmt: skip
        return trainer(
            model=AutoModelForCausalLM.from_pretrained(directory),
            reward_funcs=lambda completions, **_: list(rewards),
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": ["a", "b"]}),
            processing_class=AutoTokenizer.from_pretrained(directory),
        )

    return Trainers(build(GRPOConfig, GRPOTrainer), build(RLOOConfig, RLOOTrainer), rewards)


def scored(trainer: Any, trl: Trainers, rewards: list[float]) -> Any:
    """What TRL makes of two prompts' groups with these rewards."""
    trl.rewards[:] = rewards
    return trainer._generate_and_score_completions([{"prompt": "Hello"}] * GROUP + [{"prompt": "A word"}] * GROUP)


def as_sampled(rewards: list[float], mask: Tensor, **more: Tensor) -> Sampled:
    groups = torch.arange(len(rewards)) // GROUP
    return Sampled(torch.tensor(rewards), groups, mask.float(), torch.zeros_like(mask, dtype=torch.float32), **more)


REWARDS = [0.5, 1.25, -2.0, 0.5, 1.0, 1.0, 1.0, 7.0]


@pytest.mark.parametrize(("scale", "normalise"), [("group", True), ("none", False)])
@pytest.mark.parametrize("rewards", [REWARDS, [1.0] * GROUP + [0.0, 1.0, 0.0, 0.0]], ids=["spread", "flat"])
def test_grpos_advantages(trl: Trainers, scale: str, normalise: bool, rewards: list[float]) -> None:
    trl.grpo.scale_rewards = scale
    expected = scored(trl.grpo, trl, rewards)
    batch = as_sampled(rewards, expected["completion_mask"])
    credit = made(normalise_std=normalise, advantage_epsilon=1e-4).credit(batch)
    assert per_rollout(credit.advantages, batch.mask) == pytest.approx(expected["advantages"].tolist(), abs=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_rloos_advantages_with_the_kl_in_the_reward(trl: Trainers, beta: float) -> None:
    """The policy has moved away from its reference; TRL measures k1 over the sampled tokens of each response."""
    trainer = trl.rloo
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    trainer.beta = beta
    expected = scored(trainer, trl, REWARDS)
    mask = expected["completion_mask"]

    @torch.no_grad()
    def logprobs(model: Any) -> Tensor:
        ids = torch.cat([expected["prompt_ids"], expected["completion_ids"]], 1)
        seen = torch.cat([expected["prompt_mask"], mask], 1)
        return trainer._get_per_token_logps_and_entropies(model, ids, seen, mask.shape[1])[0] * mask

    batch = as_sampled(REWARDS, mask, old=logprobs(trainer.model), reference=logprobs(trainer.ref_model))
    assert batch.old is not None and batch.reference is not None
    assert float((batch.old - batch.reference).abs().max()) > 0.1
    credit = made("rloo", kl="k1", kl_in="reward", kl_coef=beta).credit(batch)
    assert per_rollout(credit.advantages, batch.mask) == pytest.approx(expected["advantages"].tolist(), abs=1e-6)


def trl_loss(
    trainer: Any, tokens: PolicyTokens, correction: Tensor | None = None, weighted: bool = False, **settings: Any
) -> Tensor:
    """TRL's loss of these log-probs, which stand in for its model's forward pass alone."""
    mask = tokens.mask
    for name, value in {"use_vllm": correction is not None, **settings}.items():
        setattr(trainer, name, value)
    trainer.args.use_bias_correction_kl = weighted
    trainer.vllm_importance_sampling_correction = correction is not None
    trainer.current_gradient_accumulation_steps = 1
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (tokens.logprobs, tokens.entropy, None)
    ids = torch.zeros_like(mask, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids, "prompt_mask": mask, "completion_ids": ids, "completion_mask": mask,
        "advantages": tokens.advantages.gather(1, mask.argmax(1, keepdim=True))[:, 0],
        "old_per_token_logps": tokens.old, "ref_per_token_logps": tokens.reference,
        "old_logps": tokens.old.sum(1), "importance_sampling_ratio": correction, "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    try:
        return trainer._compute_loss(SimpleNamespace(training=True), inputs)
    finally:
        del trainer._get_per_token_logps_and_entropies


def compare(trainer: Any, options: dict[str, Any], correct: Callable | None = None, **settings: Any) -> PolicyTokens:
    """Our loss, and its gradients with respect to log-probs and entropies, are TRL's."""
    tokens = random_tokens(LENGTHS, seed=3, advantages=ADVANTAGES)
    correction = None if correct is None else correct(tokens)
    expected = trl_loss(trainer, tokens, correction, options.get("kl_weighted", False), **settings)
    found = total_loss(made(**options), tokens)
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)
    inputs = [tokens.logprobs, tokens.entropy]
    pairs = zip(
        torch.autograd.grad(found, inputs, allow_unused=True, materialize_grads=True),
        torch.autograd.grad(expected, inputs, allow_unused=True, materialize_grads=True), strict=True,
    )  # fmt: skip
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    return tokens


LOSSES = {
    "grpo": ({"name": "grpo", "loss_mean": "sequence", **CLIPS}, {"loss_type": "grpo"}),
    "bnpo": ({"name": "grpo", "loss_mean": "token", **CLIPS}, {"loss_type": "bnpo"}),
    "dapo": ({"name": "grpo", "loss_mean": "token", **CLIPS}, {"loss_type": "dapo"}),
    "dr_grpo": ({"name": "grpo", "loss_mean": "constant", "loss_length": LENGTH, **CLIPS}, {"loss_type": "dr_grpo"}),
    "cispo": ({"name": "cispo", "loss_mean": "token", "clip_low": 1.0, "clip_high": 0.2}, {"loss_type": "cispo"}),
    "gspo": (
        {"name": "gspo", "loss_mean": "sequence", **CLIPS},
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    ),
}


def settled(name: str, beta: float, weighted: bool, bonus: float) -> bool:
    """Where TRL and we mean the same: it averages the entropy over tokens whatever it averages the loss over, and
    weighs GSPO's KL by the ratio of the response."""
    return not (bonus and name in ("grpo", "dr_grpo", "gspo")) and not (weighted and (name == "gspo" or not beta))


@pytest.mark.parametrize(
    ("name", "beta", "weighted", "bonus"),
    [case for case in itertools.product(LOSSES, [0.0, 0.3], [False, True], [0.0, 0.05]) if settled(*case)],
)
def test_losses_of_the_grpo_family_and_their_gradients(
    trl: Trainers, name: str, beta: float, weighted: bool, bonus: float
) -> None:
    options, settings = LOSSES[name]
    high = 1.2 if name == "cispo" else 0.2  # TRL's bound of CISPO is of the ratio itself
    settings = {
        "importance_sampling_level": "token", "epsilon_low": 0.1, "epsilon_high": high, "beta": beta,
        "_entropy_bonus_enabled": bonus > 0, "entropy_coef": bonus, **settings,
    }  # fmt: skip
    own = {"kl_coef": beta, "kl_weighted": weighted, "entropy_coef": bonus}
    tokens = compare(trl.grpo, {**own, **options}, **settings)
    clipped = made(**options).token_loss(tokens)[1]["clipped"]
    assert 0 < float(clipped[tokens.mask > 0].mean()) < 1, "some ratios beyond their bounds, and some within"


CORRECTIONS = {
    "tis": lambda tokens: (tokens.old - tokens.sampler).exp().clamp(max=1.2),
    "icepop": lambda tokens: _between((tokens.old - tokens.sampler).exp()),
    "sequence_mask": lambda tokens: _between((tokens.old - tokens.sampler).sum(1, keepdim=True).exp()),
}


def _between(ratio: Tensor) -> Tensor:
    return ratio * ((ratio >= 0.8) & (ratio <= 1.2))


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_a_corrected_loss_with_a_kl_beside_it(trl: Trainers, correction: str) -> None:
    """TRL's place of the factor: on the surrogate, before the KL. The factors are its modes token_truncate, token_mask
    and sequence_mask, written out."""
    options = {"loss_mean": "sequence", "kl_coef": 0.3, "correction": correction, **CLIPS}
    options |= {"correction_low": 0.8, "correction_high": 1.2}
    compare(
        trl.grpo, options, CORRECTIONS[correction], loss_type="grpo", importance_sampling_level="token",
        epsilon_low=0.1, epsilon_high=0.2, beta=0.3, _entropy_bonus_enabled=False,
    )  # fmt: skip


@pytest.mark.parametrize("step", [0.0, 0.2])
def test_rloos_loss_is_of_whole_responses(trl: Trainers, step: float) -> None:
    tokens = random_tokens(LENGTHS, seed=4, step=step, advantages=ADVANTAGES)
    tokens = replace(tokens, reference=None)
    trl.rloo.epsilon_low, trl.rloo.epsilon_high = 0.1, 0.2
    expected = trl_loss(trl.rloo, tokens)
    found = total_loss(made("rloo", loss_mean="sequence", kl_coef=0.0, **CLIPS), tokens)
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)
    [ours], [theirs] = torch.autograd.grad(found, tokens.logprobs), torch.autograd.grad(expected, tokens.logprobs)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
