"""Rules in both directions: Qwen3's table, on tensors made from its own shapes, and what other families add.

Legend: D hidden, V vocabulary, P padded vocabulary.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nla_megatron.conversion.families import rules_of
from nla_megatron.conversion.families.llama_like import decoder_rules
from nla_megatron.conversion.families.qwen3 import config_from_shape, shape_from_config
from nla_megatron.conversion.rules import Part, ReadSlice, Rule, by_name
from nla_megatron.types import Experts, ModelShape

# Every size differs from every other, so that no transposition fits by chance; four groups, so that tp 4 divides them.
SHAPE = ModelShape(
    family="Qwen3ForCausalLM",
    num_layers=2,
    hidden_size=20,
    ffn_hidden_size=12,
    num_heads=8,
    num_kv_heads=4,
    head_dim=6,
    vocab_size=1000,
    rope_theta=5000.0,
    norm_eps=1e-5,
    tied_embeddings=False,
    qk_norm=True,
    max_positions=64,
)


def hf_tensors(rules: list[Rule]) -> dict[str, Tensor]:
    """Every HF tensor of a table, each number in it once in the whole model."""
    shapes = {part.hf: rule.hf_shape(part) for rule in rules for part in rule.parts}
    tensors, start = {}, 1
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        tensors[name] = torch.arange(start, start + count, dtype=torch.float64).reshape(shape)
        start += count
    return tensors


def reader(tensors: dict[str, Tensor]) -> ReadSlice:
    return lambda name, axis, start, stop: tensors[name].narrow(axis, start, stop - start)


def shards_of(rule: Rule, tensors: dict[str, Tensor], tp: int) -> list[Tensor]:
    return [rule.read(reader(tensors), rank, tp) for rank in range(tp)]


def rule(name: str, shape: ModelShape = SHAPE) -> Rule:
    return by_name(rules_of(shape, with_head=True))[name]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_reading_and_writing_back_is_the_identity(tp: int, tied: bool) -> None:
    rules = rules_of(replace(SHAPE, tied_embeddings=tied), with_head=True)
    tensors = hf_tensors(rules)
    written: dict[str, Tensor] = {}
    for one in rules:
        shards = shards_of(one, tensors, tp)
        written |= one.write(shards if one.tp_axis is not None else shards[:1])
    assert written.keys() == tensors.keys()
    assert [name for name in tensors if not torch.equal(written[name], tensors[name])] == []


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_slices_of_all_ranks_cover_each_tensor_exactly_once(tp: int) -> None:
    rules = rules_of(SHAPE, with_head=True)
    tensors = hf_tensors(rules)
    for one in rules:
        for part in one.parts:
            counts = torch.zeros_like(tensors[part.hf])
            for rank in range(tp):
                axis, start, stop = one.slice_of(part, rank, tp)
                counts.narrow(axis, start, stop - start).add_(1)
            expected = 1 if one.tp_axis is not None else tp
            assert bool((counts == expected).all()), f"{part.hf} at tp {tp}"


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_shard_has_megatrons_shape(tp: int) -> None:
    """Rows of the output dimension for column-parallel layers, columns of the input for row-parallel ones."""
    d, ffn, heads = SHAPE.hidden_size, SHAPE.ffn_hidden_size, SHAPE.num_heads * SHAPE.head_dim
    qkv = heads + 2 * SHAPE.num_kv_heads * SHAPE.head_dim
    block = "decoder.layers.1."
    expected = {
        "embedding.word_embeddings.weight": (1024 // tp, d),
        "output_layer.weight": (1024 // tp, d),
        "decoder.final_layernorm.weight": (d,),
        f"{block}input_layernorm.weight": (d,),
        f"{block}pre_mlp_layernorm.weight": (d,),
        f"{block}self_attention.q_layernorm.weight": (SHAPE.head_dim,),
        f"{block}self_attention.k_layernorm.weight": (SHAPE.head_dim,),
        f"{block}self_attention.linear_qkv.weight": (qkv // tp, d),
        f"{block}self_attention.linear_proj.weight": (d, heads // tp),
        f"{block}mlp.linear_fc1.weight": (2 * ffn // tp, d),
        f"{block}mlp.linear_fc2.weight": (d, ffn // tp),
    }
    tensors = hf_tensors(rules_of(SHAPE, with_head=True))
    assert {name: tuple(shards_of(rule(name), tensors, tp)[-1].shape) for name in expected} == expected


def test_query_key_and_value_interleave_by_group() -> None:
    """Two groups of two heads of one row each: Megatron wants q0 q1 k0 v0 | q2 q3 k1 v1."""
    qkv = Rule("qkv", (2, 4, 1, 1), (Part("q", 2), Part("k"), Part("v")), tp_axis=0, slot_axis=1)
    tensors = {
        "q": torch.tensor([[0.0], [1], [2], [3]]),
        "k": torch.tensor([[10.0], [11]]),
        "v": torch.tensor([[20.0], [21]]),
    }
    assert shards_of(qkv, tensors, 1)[0].flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert [shard.flatten().tolist() for shard in shards_of(qkv, tensors, 2)] == [[0, 1, 10, 20], [2, 3, 11, 21]]


def test_the_familys_own_attention_follows_the_same_order() -> None:
    """Row by row from heads: group g holds query heads 2g and 2g + 1, then key head g, then value head g."""
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    tensors = hf_tensors(rules_of(SHAPE, with_head=True))
    q, k, v = (tensors[f"model.layers.0.self_attn.{one}_proj.weight"] for one in "qkv")
    heads = {one: list(tensor.split(SHAPE.head_dim)) for one, tensor in (("q", q), ("k", k), ("v", v))}
    by_hand = torch.cat([
        torch.cat([heads["q"][2 * group], heads["q"][2 * group + 1], heads["k"][group], heads["v"][group]])
        for group in range(SHAPE.num_kv_heads)
    ])  # fmt: skip
    assert torch.equal(shards_of(rule(name), tensors, 1)[0], by_hand)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_each_rank_holds_its_gate_above_its_up(tp: int) -> None:
    tensors = hf_tensors(rules_of(SHAPE, with_head=True))
    gate, up = (tensors[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    for rank, shard in enumerate(shards_of(rule("decoder.layers.0.mlp.linear_fc1.weight"), tensors, tp)):
        assert torch.equal(shard, torch.cat([gate.chunk(tp)[rank], up.chunk(tp)[rank]]))


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", ["embedding.word_embeddings.weight", "output_layer.weight"])
def test_vocabulary_padding_is_zero_and_leaves_no_trace_in_the_export(name: str, tp: int) -> None:
    """1,000 tokens in 1,024 rows whatever the TP; the padding falls on the last rank."""
    one, tensors = rule(name), hf_tensors(rules_of(SHAPE, with_head=True))
    [part] = one.parts
    shards = shards_of(one, tensors, tp)
    assert [len(shard) for shard in shards] == [1024 // tp] * tp
    full = torch.cat(shards)
    assert torch.equal(full[:1000], tensors[part.hf]) and not full[1000:].any()
    shards[-1][-24:] = float("nan")  # whatever training leaves there
    assert torch.equal(one.write(shards)[part.hf], tensors[part.hf])


def test_a_rank_that_holds_only_padding_reads_nothing() -> None:
    """130 tokens are 256 rows: at tp 4 the last 64 rows hold no token."""
    one = rule("embedding.word_embeddings.weight", replace(SHAPE, vocab_size=130))
    [part] = one.parts
    assert [one.slice_of(part, rank, 4) for rank in range(4)] == [
        (0, 0, 64),
        (0, 64, 128),
        (0, 128, 130),
        (0, 130, 130),
    ]
    shards = shards_of(one, {part.hf: torch.ones(130, 20)}, 4)
    assert [int(shard.sum(dim=1).count_nonzero()) for shard in shards] == [64, 64, 2, 0]
    assert torch.equal(one.write(shards)[part.hf], torch.ones(130, 20))


def test_tied_embeddings_export_one_tensor() -> None:
    tied, untied = (rules_of(replace(SHAPE, tied_embeddings=tied), with_head=True) for tied in (True, False))
    exported = {kind: Counter(part.hf for one in rules if not one.alias for part in one.parts)
                for kind, rules in (("tied", tied), ("untied", untied))}  # fmt: skip
    assert "lm_head.weight" not in exported["tied"] and exported["untied"]["lm_head.weight"] == 1
    assert all(count == 1 for counts in exported.values() for count in counts.values())


def test_the_ar_has_neither_final_norm_nor_output_layer() -> None:
    whole, cut = (set(by_name(rules_of(SHAPE, with_head=head))) for head in (True, False))
    assert whole - cut == {"decoder.final_layernorm.weight", "output_layer.weight"} and cut < whole


@pytest.mark.parametrize("tied", [True, False])
def test_names_and_shapes_are_those_of_transformers(tied: bool) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = replace(SHAPE, tied_embeddings=tied)
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**config_from_shape(shape)))
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    ours = {part.hf: rule.hf_shape(part) for rule in rules_of(shape, with_head=True) for part in rule.parts}
    assert ours == theirs


@pytest.mark.parametrize("tied", [True, False])
def test_shape_to_config_and_back_is_the_identity(tied: bool) -> None:
    shape = replace(SHAPE, tied_embeddings=tied)
    assert shape_from_config(config_from_shape(shape)) == shape
    assert shape_from_config(json.loads(json.dumps(config_from_shape(shape)))) == shape


def test_transformers_reads_the_config_we_write(tmp_path: Path) -> None:
    """And what it writes in turn is still the same shape to us."""
    from transformers import AutoConfig

    (tmp_path / "config.json").write_text(json.dumps(config_from_shape(SHAPE)))
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config).__name__ == "Qwen3Config"
    found = (config.hidden_size, config.num_key_value_heads, config.head_dim, config.rms_norm_eps, config.vocab_size)
    assert found == (20, 4, 6, 1e-5, 1000)
    assert config.rope_parameters["rope_theta"] == 5000.0 and not config.tie_word_embeddings
    config.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert shape_from_config({**again, "architectures": ["Qwen3ForCausalLM"]}) == SHAPE


def config(**changes: Any) -> dict[str, Any]:
    """The configuration of `SHAPE` with keys changed, or left out where the change is None."""
    return {key: value for key, value in {**config_from_shape(SHAPE), **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "theta"),
    [
        ({"rope_parameters": {"rope_theta": 7e5, "rope_type": "default"}, "rope_theta": None}, 7e5),
        ({"rope_parameters": None, "rope_theta": 3e4}, 3e4),
        ({"rope_parameters": None, "rope_theta": 30000}, 3e4),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 2e4}, 2e4),
    ],
)
def test_the_rope_base_is_read_from_the_new_and_from_the_old_key(changes: dict[str, Any], theta: float) -> None:
    assert shape_from_config(config(**changes)).rope_theta == theta


def test_a_head_width_that_is_not_given_is_qwen3s_own() -> None:
    """Not the hidden size's share, as in other families: transformers assumes 128."""
    assert shape_from_config(config(head_dim=None, num_attention_heads=4)).head_dim == 128


def test_biases_interleave_as_their_weights_do() -> None:
    """A vector's axes merge into one: each number stays with the row of the weight that it belongs to."""
    shape = replace(SHAPE, qkv_bias=True, output_bias=True, mlp_bias=True)
    rules = by_name(decoder_rules(shape, with_head=True))
    for layer in ("self_attention.linear_qkv", "mlp.linear_fc1"):
        weight, bias = (rules[f"decoder.layers.1.{layer}.{kind}"] for kind in ("weight", "bias"))
        numbered, start = {}, 0
        for part in bias.parts:
            [length] = bias.hf_shape(part)
            numbered[part.hf] = torch.arange(start, start + length, dtype=torch.float64)
            start += length
        for part, like in zip(weight.parts, bias.parts, strict=True):
            numbered[part.hf] = numbered[like.hf][:, None].expand(-1, shape.hidden_size)
        for tp in (1, 2, 4):
            biases = shards_of(bias, numbered, tp)
            rows = [shard[:, 0] for shard in shards_of(weight, numbered, tp)]
            assert all(torch.equal(one, row) for one, row in zip(biases, rows, strict=True))
            written = bias.write(biases)
            assert all(torch.equal(written[part.hf], numbered[part.hf]) for part in bias.parts)


def test_sinks_are_cut_with_their_heads() -> None:
    shape = replace(SHAPE, sinks=True)
    sinks = by_name(decoder_rules(shape, with_head=True))[
        "decoder.layers.0.self_attention.core_attention.softmax_offset"
    ]
    tensors = {"model.layers.0.self_attn.sinks": torch.arange(8.0)}
    assert [shard.tolist() for shard in shards_of(sinks, tensors, 4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_experts_are_numbered_over_all_ranks_and_cut_alike() -> None:
    shape = replace(SHAPE, experts=Experts(3, 2, 8))
    rules = decoder_rules(shape, with_head=False)
    numbers = [(rule.megatron, rule.expert) for rule in rules if rule.expert is not None]
    assert len(numbers) == 2 * 3 * SHAPE.num_layers
    assert all(f".local_experts.{expert}." in name for name, expert in numbers)
    tensors = hf_tensors(rules)
    gate, up = (tensors[f"model.layers.1.mlp.experts.2.{name}_proj.weight"] for name in ("gate", "up"))
    first = by_name(rules)["decoder.layers.1.mlp.experts.local_experts.2.linear_fc1.weight"]
    for rank, shard in enumerate(shards_of(first, tensors, 2)):
        assert torch.equal(shard, torch.cat([gate.chunk(2)[rank], up.chunk(2)[rank]]))
    router = by_name(rules)["decoder.layers.1.mlp.router.weight"]
    assert router.tp_axis is None and router.expert is None
