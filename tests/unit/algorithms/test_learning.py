"""Every preset, in a loop like the trainer's, raises the reward of a policy that is a table of logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nla_megatron.algorithms import Algorithm, make_algorithm
from nla_megatron.config.compose import compose, conf_dir
from nla_megatron.types import PolicyTokens, Sampled

PRESETS = sorted(path.stem for path in (conf_dir() / "algorithm").glob("*.yaml"))
PROMPTS, SAMPLES, TOKENS, VOCABULARY, STEPS = 8, 4, 4, 6, 25


class Table:
    """Logits per position, the same for every prompt, and a critic of a value per position."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.logits_TV = torch.randn(TOKENS, VOCABULARY, generator=self.generator).requires_grad_()
        self.values_T = torch.zeros(TOKENS, requires_grad=True)
        self.reference_TV = self.logits_TV.detach().log_softmax(-1)
        self.policy = torch.optim.Adam([self.logits_TV], lr=0.05)
        self.critic = torch.optim.Adam([self.values_T], lr=0.1)

    def sample(self) -> Tensor:
        count = PROMPTS * SAMPLES
        probabilities_TV = self.logits_TV.detach().softmax(-1)
        return torch.multinomial(probabilities_TV, count, replacement=True, generator=self.generator).T

    def logprobs(self, ids_NT: Tensor, table_TV: Tensor) -> Tensor:
        return table_TV.log_softmax(-1)[torch.arange(TOKENS), ids_NT]


def reward(ids_NT: Tensor, groups_N: Tensor) -> Tensor:
    """How many tokens are the first of the vocabulary; some prompts give more than others whatever is answered."""
    return (ids_NT == 0).float().sum(-1) + groups_N % 3


def step(algorithm: Algorithm, table: Table, epochs: int, minibatches: int) -> float:
    ids_NT, groups_N = table.sample(), torch.arange(PROMPTS).repeat_interleave(SAMPLES)
    rewards_N = reward(ids_NT, groups_N)
    greedy_T = table.logits_TV.detach().argmax(-1)
    old_NT = table.logprobs(ids_NT, table.logits_TV).detach()
    mask_NT = torch.ones(ids_NT.shape)
    batch = Sampled(
        rewards_N, groups_N, mask_NT, sampler=old_NT, old=old_NT, reference=table.logprobs(ids_NT, table.reference_TV),
        values=table.values_T.detach().expand_as(mask_NT), greedy=reward(greedy_T[None], groups_N),
    )  # fmt: skip
    credit = algorithm.credit(batch)
    for chosen in [part for _ in range(epochs) for part in torch.arange(PROMPTS).chunk(minibatches)]:
        rows = torch.isin(groups_N, chosen)
        weights_BT = algorithm.token_weights(mask_NT[rows])
        update(algorithm, table, batch, credit.advantages, credit.returns, ids_NT, rows, weights_BT)
    return float(rewards_N.mean())


def update(
    algorithm: Algorithm, table: Table, batch: Sampled, advantages_NT: Tensor, returns_NT: Tensor | None,
    ids_NT: Tensor, rows: Tensor, weights_BT: Tensor,
) -> None:  # fmt: skip
    assert batch.old is not None and batch.reference is not None and batch.values is not None
    spread_TV = table.logits_TV.log_softmax(-1)
    tokens = PolicyTokens(
        logprobs=table.logprobs(ids_NT[rows], table.logits_TV), old=batch.old[rows], sampler=batch.sampler[rows],
        advantages=advantages_NT[rows], mask=batch.mask[rows], reference=batch.reference[rows],
        entropy=-(spread_TV.exp() * spread_TV).sum(-1).expand_as(weights_BT),
    )  # fmt: skip
    if not algorithm.needs.reference:
        tokens = replace(tokens, reference=None)
    table.policy.zero_grad()
    (algorithm.token_loss(tokens)[0] * weights_BT).sum().backward()
    table.policy.step()
    if returns_NT is not None:
        values_BT = table.values_T.expand_as(weights_BT)
        loss_BT, _ = algorithm.value_loss(values_BT, batch.values[rows], returns_NT[rows])
        table.critic.zero_grad()
        (loss_BT * weights_BT).sum().backward()
        table.critic.step()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_raises_the_reward_for_every_seed(name: str) -> None:
    config = compose("rl", ["out=o", "av=a", "ar=b", "data=d", f"algorithm={name}"]).algorithm
    for seed in range(3):
        algorithm, table = make_algorithm(config), Table(seed)
        rewards = [step(algorithm, table, config.epochs, config.minibatches) for _ in range(STEPS)]
        assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.3, f"{name}, seed {seed}: {rewards}"
