"""Adapters by hand: their scale, their place in a fused layer, and what may be asked of them.

Legend: T tokens, B rows, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nla_megatron.conversion.families import rules_of
from nla_megatron.conversion.peft import attach, fused_layers
from nla_megatron.conversion.rules import by_name
from nla_megatron.errors import ConfigError, UnsupportedModel
from nla_megatron.models.lora import LoraLinear, adapted, merged, merged_local
from nla_megatron.models.lora_spec import PROJECTIONS, LoraSpec, targets_of
from nla_megatron.models.verbalizer import build_verbalizer
from nla_megatron.parallel.world import World
from nla_megatron.types import Experts, ModelShape
from tests.support.tiny import SHAPE

BLOCK = "decoder.layers.1."


def adapted_model(world: World, spec: LoraSpec, dtype: str = "float32") -> Any:
    """A model with random weights and pairs."""
    torch.manual_seed(0)
    model = build_verbalizer(SHAPE, world, dtype)
    attach(model, SHAPE, world, spec)
    with torch.no_grad():
        for linear in adapted(model).values():
            for parameter in linear.lora.parameters():
                parameter.normal_(std=0.1)
    return model


def hf_delta(linear: Any, projection: str) -> Tensor:
    pair = linear.lora.pairs[projection]
    return pair.scale * pair.B.detach() @ pair.A.detach()


def test_the_scale_is_alpha_over_the_rank_or_its_root() -> None:
    plain = LoraSpec(16, 32.0, ranks={"q_proj": 4}, alphas={"up_proj": 8.0})
    assert (plain.scale_of("k_proj"), plain.scale_of("q_proj"), plain.scale_of("up_proj")) == (2.0, 8.0, 0.5)
    assert LoraSpec(16, 32.0, rslora=True).scale_of("k_proj") == 8.0
    assert LoraSpec(128, 16.0, rslora=True).scale_of("o_proj") == pytest.approx(math.sqrt(2))


def test_targets_are_names_or_all_of_them() -> None:
    assert targets_of("all-linear") == PROJECTIONS
    assert targets_of(["v_proj", "q_proj"]) == ("q_proj", "v_proj")
    with pytest.raises(ConfigError, match="'lm_head'"):
        LoraSpec(4, 8.0, targets_of(["q_proj", "lm_head"]))


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"alpha": 0.0}, {"alpha": math.nan}, {"targets": ()}])
def test_an_adapter_that_could_do_nothing_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        LoraSpec(**{"rank": 4, "alpha": 8.0, **wrong})


def test_only_the_adapters_learn_and_the_bases_names_stay(world: World) -> None:
    plain = {name for name, _ in build_verbalizer(SHAPE, world, "float32").named_parameters()}
    model = adapted_model(world, LoraSpec(4, 8.0))
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    names = {name for name, _ in model.named_parameters()}
    assert names - plain == learning and plain <= names
    assert len(learning) == SHAPE.num_layers * len(PROJECTIONS) * 2
    assert all(".lora." in name for name in learning)


def test_fresh_adapters_start_as_peft_starts_them(world: World) -> None:
    model = build_verbalizer(SHAPE, world, "float32")
    attach(model, SHAPE, world, LoraSpec(4, 8.0), seed=3)
    layers = adapted(model)
    bound = 1 / math.sqrt(SHAPE.hidden_size)
    A = layers[f"{BLOCK}self_attention.linear_qkv"].lora.pairs["q_proj"].A.detach()
    assert float(A.abs().max()) <= bound and float(A.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert all(not pair.B.any() for linear in layers.values() for pair in linear.lora.pairs.values())
    draws = [pair.A.detach() for linear in layers.values() for pair in linear.lora.pairs.values()]
    same_size = [draw for draw in draws if draw.shape == A.shape]
    assert len({float(draw[0, 0]) for draw in same_size}) == len(same_size), "no two projections start alike"


@pytest.mark.parametrize("targets", [PROJECTIONS, ("k_proj", "up_proj", "down_proj"), ("q_proj", "v_proj", "o_proj")])
def test_a_merged_weight_is_made_of_merged_projections(world: World, targets: tuple[str, ...]) -> None:
    """The rule takes the merged parameter apart; each projection moved by its own B A, the others not at all."""
    model = adapted_model(world, LoraSpec(4, 12.0, targets))
    rules, layers = by_name(rules_of(SHAPE, with_head=False)), adapted(model)
    for name, after in merged(model):
        linear = layers[name.removesuffix(".weight")]
        before = rules[name].write([linear.weight.detach()])
        for hf, weight in rules[name].write([after]).items():
            projection = hf.split(".")[-2]
            expected = before[hf] + hf_delta(linear, projection) if projection in targets else before[hf]
            torch.testing.assert_close(weight, expected, rtol=0, atol=1e-6)
    assert layers.keys() == {
        f"decoder.layers.{block}.{layer}"
        for block in range(SHAPE.num_layers)
        for layer in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
        if layer != "mlp.linear_fc1" or "up_proj" in targets
        if layer != "mlp.linear_fc2" or "down_proj" in targets
        if layer != "self_attention.linear_proj" or "o_proj" in targets
    }


def test_an_adapted_layer_computes_what_its_merged_weight_does(world: World) -> None:
    model = adapted_model(world, LoraSpec(4, 12.0, ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")))
    for linear in adapted(model).values():
        kept = linear.weight.detach().clone()
        input_TBI = torch.randn(5, 2, linear.weight.shape[1])
        expected = input_TBI @ merged_local(linear).T
        torch.testing.assert_close(linear(input_TBI)[0], expected, rtol=0, atol=1e-5)
        assert torch.equal(linear.weight, kept), "merging is out of place"


def test_a_bf16_model_keeps_its_pairs_in_fp32_and_merging_rounds_once(world: World) -> None:
    linear = adapted(adapted_model(world, LoraSpec(4, 8.0), "bfloat16"))[f"{BLOCK}self_attention.linear_proj"]
    A, B = (getattr(linear.lora.pairs["o_proj"], one).detach() for one in "AB")
    assert (linear.weight.dtype, A.dtype, B.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    expected = (linear.weight.detach().float() + (B @ A) * 2.0).bfloat16()
    assert merged_local(linear).dtype == torch.bfloat16 and torch.equal(merged_local(linear), expected)
    input_TBI = torch.randn(5, 2, linear.weight.shape[1])
    output = linear(input_TBI.bfloat16())[0]
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), input_TBI @ expected.float().T, rtol=0.05, atol=0.05)


def test_the_checkpoint_holds_the_base_under_its_own_keys_and_each_pair_once(world: World) -> None:
    plain = build_verbalizer(SHAPE, world, "float32").sharded_state_dict()
    state = adapted_model(world, LoraSpec(4, 8.0)).sharded_state_dict()
    assert {key for key in state if ".lora." not in key} == set(plain)
    pairs = {key: value.local_shape for key, value in state.items() if ".lora." in key}
    assert len(pairs) == SHAPE.num_layers * len(PROJECTIONS) * 2
    assert pairs[f"{BLOCK}self_attention.linear_qkv.lora.k_proj.B"] == (64, 4)


def test_a_second_adapter_is_refused(world: World) -> None:
    model = adapted_model(world, LoraSpec(4, 8.0))
    with pytest.raises(UnsupportedModel, match="linear_qkv has an adapter already"):
        attach(model, SHAPE, world, LoraSpec(2, 8.0))
    assert isinstance(adapted(model)[f"{BLOCK}mlp.linear_fc1"], LoraLinear)


def test_experts_are_refused_by_name(world: World) -> None:
    shape = ModelShape(**{**vars(SHAPE), "experts": Experts(8, 2, 32)})
    with pytest.raises(UnsupportedModel, match="gate_proj, up_proj, down_proj of 8 experts"):
        attach(None, shape, world, LoraSpec(4, 8.0))


@pytest.mark.parametrize("tp", [1, 2])
def test_a_rank_holds_its_part_of_every_projection(tp: int) -> None:
    qkv, proj, fc1, fc2 = fused_layers(SHAPE, tp)[:4]
    assert [layer.inputs_cut for layer in (qkv, proj, fc1, fc2)] == [False, True, False, True]
    assert [slot.projection for slot in qkv.slots] == ["q_proj", "k_proj", "v_proj"]
    assert [slot.view for slot in qkv.slots] == [(2 // tp, 2, 32, 64), (2 // tp, 1, 32, 64), (2 // tp, 1, 32, 64)]
    assert proj.slots[0].view == (64, 128 // tp) and fc1.slots[1].view == (1, 96 // tp, 64)
    assert fc2.slots[0].hf == "model.layers.0.mlp.down_proj"
