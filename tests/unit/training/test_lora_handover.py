"""How a LoRA policy reaches the sampler: what weights of 16 bits lose of it, and what is done about it.

Legend: I inputs, R rank.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nla_megatron.config.compose import compose
from nla_megatron.conversion.peft import attach
from nla_megatron.models.lora import adapted, merged_local
from nla_megatron.models.lora_spec import LoraSpec
from nla_megatron.models.verbalizer import build_verbalizer
from nla_megatron.parallel.world import World
from nla_megatron.training.lora import algorithm_of, rollout_of
from nla_megatron.types import Experts
from tests.support.tiny import SHAPE

WIDE, RANK, LR = 8192, 128, 1e-4
MIXTURE = replace(SHAPE, experts=Experts(4, 2, 48))
BF16 = "rollout.dtype=bfloat16"


def arrived(found: Tensor, delta: Tensor) -> float:
    """The share of a change that is in what was found of it, by its projection onto the change."""
    return float((found.double() * delta).sum() / delta.double().square().sum())


def test_of_a_first_update_weights_of_16_bits_take_up_little_and_an_adapter_carries_all(world: World) -> None:
    """rsLoRA of rank 128 at a fan-in of 8192, after so many of Adam's steps, each of which moves B by the step size."""
    torch.manual_seed(0)
    shape = replace(SHAPE, num_layers=1, ffn_hidden_size=WIDE)
    model = build_verbalizer(shape, world, "bfloat16")
    attach(model, shape, world, LoraSpec(RANK, 16.0, ("down_proj",), rslora=True))
    [linear] = adapted(model).values()
    [pair] = linear.lora.pairs.values()
    with torch.no_grad():
        linear.weight.normal_(std=0.02)
        signs = torch.randint(0, 2, pair.B.shape) * 2.0 - 1
    merged, beside = {}, {}
    for steps in (1, 3, 10):
        with torch.no_grad():
            pair.B.copy_(signs * LR * steps)
        exact = linear.lora.delta()
        merged[steps] = arrived(merged_local(linear).float() - linear.weight.float(), exact)
        as_sent = pair.B.bfloat16().float() @ pair.A.bfloat16().float() * pair.scale
        beside[steps] = arrived(as_sent.detach(), exact)
    assert merged[1] < 0.4 and merged[1] < merged[3] < merged[10]
    assert min(beside.values()) > 0.99


@pytest.mark.parametrize(
    ("words", "shape", "lora", "correction"),
    [
        ((), SHAPE, "merged", "none"),
        ((BF16,), SHAPE, "merged", "none"),  # all weights are trained: there is nothing to merge
        (("lora.rank=4",), SHAPE, "adapter", "none"),
        (("lora.rank=128", BF16), SHAPE, "adapter", "none"),
        (("lora.rank=4", "lora.quantize=nf4", BF16), SHAPE, "merged", "tis"),
        (("lora.rank=4", "lora.quantize=nf4"), SHAPE, "merged", "none"),  # fp32 loses nothing
        (("lora.rank=4", BF16), MIXTURE, "merged", "tis"),
        (("lora.rank=600", BF16), SHAPE, "merged", "tis"),
        (("lora.rank=16", "rollout.lora_rank=8", BF16), SHAPE, "merged", "tis"),
        (("lora.rank=4", "rollout.lora=merged", BF16), SHAPE, "merged", "tis"),
        (("lora.rank=4", "rollout.lora=merged", "algorithm.correction=none", BF16), SHAPE, "merged", "none"),
        (("lora.rank=4", "algorithm.correction=icepop", BF16), SHAPE, "adapter", "icepop"),
        (("lora.rank=4", "rollout.engine=policy", BF16), SHAPE, None, "none"),  # it is the policy itself
    ],
)
def test_a_policy_is_handed_over_as_an_adapter_where_vllm_takes_it_and_corrected_where_it_is_rounded(
    words: tuple[str, ...], shape: object, lora: str | None, correction: str
) -> None:
    config = compose("rl", ["out=x", *words])
    assert rollout_of(config, shape).lora == lora  # type: ignore[arg-type]
    assert algorithm_of(config, shape).correction == correction  # type: ignore[arg-type]


def test_the_sampler_makes_room_for_the_policys_rank() -> None:
    assert rollout_of(compose("rl", ["out=x", "lora.rank=128"]), SHAPE).lora_rank == 128
    assert rollout_of(compose("rl", ["out=x", "lora.rank=4", "rollout.lora_rank=32"]), SHAPE).lora_rank == 32
