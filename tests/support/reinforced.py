"""A policy and its critic on a layout of Megatron, and the same by transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nla_megatron.algorithms import make_algorithm
from nla_megatron.config.schema import AlgorithmConfig
from nla_megatron.conversion.hf import read_shape
from nla_megatron.conversion.live import load_critic, load_from_hf
from nla_megatron.interventions.spec import Intervention
from nla_megatron.models.critic import response_values
from nla_megatron.models.interventions import intervene
from nla_megatron.models.verbalizer import build_verbalizer
from nla_megatron.parallel.world import World
from nla_megatron.training.module import TrainModule, Update
from nla_megatron.training.policy_loss import policy_loss, policy_statistics, value_loss, value_statistics
from tests.support.injected import LAYER, LENGTHS, OPTIM, PROMPT, STEPS, av_batch, captured, injected, rows

ENTROPY, TEMPERATURE = 0.3, 0.8


def reinforced(directory: Path, world: World) -> dict[str, Any]:
    """A policy and its critic learn from made-up advantages and returns, with an entropy bonus."""
    shape = read_shape(directory)
    data, algorithm = (
        rows(shape),
        make_algorithm(AlgorithmConfig(name="ppo", kl_coef=0.0, entropy_coef=ENTROPY, value_clip=None)),
    )
    plain, targets = av_batch(data), credit()
    mask, total = plain.fields["mask"], float(plain.fields["mask"].sum())
    fields = {"token_weights": algorithm.token_weights(mask), "sampler": mask * 0, "old_values": mask * 0}
    batch = replace(plain, fields={"mask": mask, "advantages": targets * mask, "returns": targets * mask, **fields})

    def learned(model: Any, loss: Any, names: tuple[str, ...]) -> tuple[TrainModule, list[Update]]:
        intervene(model, [Intervention(LAYER, "norm_add")])
        module = TrainModule(model, world, OPTIM, STEPS, 2, "float32")
        return module, [module.update(batch, loss, names, step) for step in range(STEPS)]

    av = build_verbalizer(shape, world, "float32")
    load_from_hf(av, str(directory), shape, world, with_head=True)
    _, policy = learned(av, policy_loss(algorithm, TEMPERATURE, total), policy_statistics(algorithm))
    critic = load_critic(str(directory), shape, world, "float32")
    module, values = learned(critic, value_loss(algorithm, total), value_statistics(algorithm))
    return {
        "policy": [(each.statistics["loss"], each.grad_norm) for each in policy],
        "entropy": [each.statistics["entropy"] for each in policy],
        "critic": [(each.statistics["loss"], each.grad_norm) for each in values],
        "values": module.rows(batch, response_values, max(LENGTHS)),
    }


def credit() -> torch.Tensor:
    """A number for each position of the rows, (N, T)."""
    return torch.randn(len(LENGTHS), max(LENGTHS), generator=torch.Generator().manual_seed(5))


def reinforced_reference(directory: Path) -> dict[str, Any]:
    """The same by transformers, forward hooks and torch's AdamW, one row at a time."""
    from transformers import AutoModelForCausalLM

    data, targets = rows(read_shape(directory)), credit()
    wanted = torch.cat([targets[row, PROMPT - 1 : length - 1] for row, length in enumerate(LENGTHS)])

    def trained(parameters: list[torch.nn.Parameter], loss_of: Any) -> list[tuple[float, float]]:
        optimizer = torch.optim.AdamW(parameters, lr=OPTIM.lr, betas=(OPTIM.beta1, OPTIM.beta2), weight_decay=0.0)
        seen = []
        for _ in range(STEPS):
            loss = loss_of()
            optimizer.zero_grad()
            loss.backward()
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, OPTIM.clip_grad))
            optimizer.step()
            seen.append((float(loss), norm))
        return seen

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    entropies = []

    def policy() -> torch.Tensor:
        logprobs, entropy = [], []
        for row, ids in enumerate(data.ids):
            with injected(model, torch.from_numpy(data.vectors[row])):
                spread = torch.log_softmax(model(torch.tensor([ids])).logits[0, PROMPT - 1 : -1] / TEMPERATURE, -1)
            logprobs.append(spread.gather(-1, torch.tensor(ids)[PROMPT:, None])[:, 0])
            entropy.append(-(spread.exp() * spread).sum(-1))
        entropies.append(float(torch.cat(entropy).mean()))
        # A ratio to itself is 1, and its gradient that of the log-prob.
        ratio = (torch.cat(logprobs) - torch.cat(logprobs).detach()).exp()
        return (-wanted * ratio - ENTROPY * torch.cat(entropy)).mean()

    policy_seen = trained(list(model.parameters()), policy)
    body = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    head = torch.nn.Linear(body.config.hidden_size, 1)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)

    def values() -> torch.Tensor:
        found = []
        for row, ids in enumerate(data.ids):
            with injected(body, torch.from_numpy(data.vectors[row])), captured(body, -1) as stream:
                body.model(torch.tensor([ids]))
            here = stream[0][PROMPT - 1 : -1]
            scaled = here / (here.square().mean(-1, keepdim=True) + body.config.rms_norm_eps).sqrt()
            found.append(head(scaled)[:, 0])
        return torch.cat(found)

    parameters = [*body.model.embed_tokens.parameters(), *body.model.layers.parameters(), *head.parameters()]
    critic_seen = trained(parameters, lambda: (values() - wanted).square().mean() / 2)
    return {"policy": policy_seen, "entropy": entropies, "critic": critic_seen, "values": values().detach()}


def compare_reinforced(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    values = torch.cat([found["values"][row, PROMPT - 1 : length - 1] for row, length in enumerate(LENGTHS)])
    out = {"value": float((values - expected["values"]).abs().max()), "value_size": float(values.abs().max())}
    for name in ("policy", "critic"):
        pairs = list(zip(found[name], expected[name], strict=True))
        out[f"{name}_loss"] = max(abs(a[0] - b[0]) for a, b in pairs)
        out[f"{name}_norm"] = max(abs(a[1] - b[1]) / b[1] for a, b in pairs)
    out["entropy"] = max(abs(a - b) for a, b in zip(found["entropy"], expected["entropy"], strict=True))
    return out
