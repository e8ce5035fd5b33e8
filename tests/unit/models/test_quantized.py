"""4-bit weights of linear layers: bitsandbytes' own numbers, in an eighth of fp32's bytes, and no copy of them kept.

Legend: T tokens, B rows, I inputs, O outputs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nla_megatron.config.schema import LoraConfig, ParallelConfig
from nla_megatron.conversion.families import rules_of
from nla_megatron.conversion.hf import SafetensorsReader, read_shape
from nla_megatron.conversion.live import global_parameters, load_from_hf, quantized
from nla_megatron.conversion.rules import by_name
from nla_megatron.errors import LayoutError, NlaError, NotFinite, VersionError
from nla_megatron.models.batching import Batch, microbatches
from nla_megatron.models.lora import adapted, linears, merged_local
from nla_megatron.models.pipeline import forward_rows
from nla_megatron.models.quantized import BLOCK, NF4, QuantizedLinear
from nla_megatron.models.verbalizer import build_verbalizer
from nla_megatron.parallel.cpu import megatron_device
from nla_megatron.parallel.world import World
from nla_megatron.reshard.execute import check_finite
from nla_megatron.reshard.megatron_side import Sources
from nla_megatron.training.export import export
from nla_megatron.training.lora import adapt, check_lora
from nla_megatron.types import Experts, Microbatch, ModelShape
from tests.support.families import family_model
from tests.support.quantized import dequantised, in_four_bits, load_in_4bit
from tests.support.tiny import SHAPE, tiny_model

IDS = [[5, 6, 7, 8, 9, 30, 31], [5, 6, 7, 10, 11, 12, 13]]
CONFIG = LoraConfig(rank=4, alpha=8.0, quantize=NF4)
FAMILIES = {
    "gemma3": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 8},
    "llama-biased": {"hidden_size": 64, "intermediate_size": 128},
    "qwen3-moe": {"hidden_size": 64, "head_dim": 8, "moe_intermediate_size": 64},
}
"""Norms behind linear layers, biases, and a mixture, whose experts are quantised like other layers."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), ffn_hidden_size=128)


def loaded(directory: Path, world: World, dtype: str = "float32") -> Any:
    shape = read_shape(directory)
    model = build_verbalizer(shape, world, dtype, NF4)
    load_from_hf(model, str(directory), shape, world, with_head=True)
    return model


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(directory: Path, world: World, request: pytest.FixtureRequest) -> Any:
    return loaded(directory, world, request.param)


def logits_of(model: Any, world: World) -> Tensor:
    """(B, T, V)"""

    def collect(logits_BTV: Tensor, part: Microbatch) -> Tensor:
        return logits_BTV[..., : model.shape.vocab_size].flatten(1)

    width = len(IDS[0]) * model.shape.vocab_size
    return forward_rows(model, Batch(ids=IDS), world, 2, collect, width).view(len(IDS), len(IDS[0]), -1)


def test_every_layer_of_the_blocks_holds_what_bitsandbytes_makes_of_each_projection(
    model: Any, directory: Path
) -> None:
    reader, rules = SafetensorsReader(directory), by_name(rules_of(model.shape, with_head=True))
    layers = quantized(model)
    assert layers.keys() == {f"{name}.weight" for name in linears(model)} and len(layers) == 4 * SHAPE.num_layers
    for name, layer in layers.items():
        for hf, weight in rules[name].write([layer.weight]).items():
            whole = reader.whole(hf)
            assert torch.equal(weight, in_four_bits(whole).to(weight.dtype)), hf
            assert not torch.equal(weight, whole.to(weight.dtype))


def test_what_is_no_linear_layer_of_a_block_is_as_it_was(model: Any, directory: Path) -> None:
    reader, rules = SafetensorsReader(directory), by_name(rules_of(model.shape, with_head=True))
    parameters = global_parameters(model)
    assert "embedding.word_embeddings.weight" in parameters and parameters.keys().isdisjoint(quantized(model))
    for name, parameter in parameters.items():
        for hf, weight in rules[name].write([parameter.detach()]).items():
            assert torch.equal(weight, reader.whole(hf).to(weight.dtype)), hf


def test_a_layer_holds_four_and_a_half_bits_a_weight(model: Any) -> None:
    for name, layer in linears(model).items():
        held = [*layer.parameters(), *layer.buffers()]
        assert sum(one.nbytes for one in held) * 8 == 4.5 * layer.weight.numel(), name
        # Behind a view there could be more than it shows.
        assert sum(one.untyped_storage().nbytes() for one in held) * 8 == 4.5 * layer.weight.numel(), name


@pytest.mark.parametrize("name", ["self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc2"])
def test_outputs_and_gradients_are_those_of_the_dequantised_weight(model: Any, name: str) -> None:
    layer = linears(model)[f"decoder.layers.1.{name}"]
    weight_OI = layer.weight
    input_TBI = torch.randn(5, 2, weight_OI.shape[1]).to(weight_OI.dtype).requires_grad_()
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one.shape) or one, lambda one: one):
        output_TBO, bias = layer(input_TBI)
    assert bias is None and weight_OI.shape not in kept and weight_OI.T.shape not in kept
    expected_TBO = input_TBI @ weight_OI.T
    assert torch.equal(output_TBO, expected_TBO)
    direction = torch.randn_like(output_TBO)
    [found] = torch.autograd.grad(output_TBO, input_TBI, direction)
    [wanted] = torch.autograd.grad(expected_TBO, input_TBI, direction)
    assert torch.equal(found, wanted)


def test_the_weight_takes_no_gradient_and_checkpoints_do_not_hold_it(directory: Path, world: World) -> None:
    model = loaded(directory, world)
    adapt(model, CONFIG, world, seed=0)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(adapted(model)) == 4 * SHAPE.num_layers and all(".lora." in name for name in learning)
    layer = linears(model)["decoder.layers.1.mlp.linear_fc1"]
    before = layer.weight
    layer(torch.randn(5, 2, before.shape[1]))[0].sum().backward()
    assert not layer.weight.requires_grad and torch.equal(layer.weight, before)
    assert layer.lora.pairs["up_proj"].B.grad is not None
    state = model.sharded_state_dict()
    assert any(".lora." in key for key in state)
    assert not [key for key in state if key.endswith(("fc1.weight", "qkv.weight", "codes", "scales"))]


def test_adapters_are_merged_into_the_dequantised_weight(directory: Path, world: World) -> None:
    model = loaded(directory, world)
    plain = {name: layer.weight for name, layer in quantized(model).items()}
    adapt(model, CONFIG, world, seed=0)
    sources = Sources(model, world)
    for name, layer in adapted(model).items():
        for pair in layer.lora.pairs.values():
            torch.nn.init.normal_(pair.B, std=0.1)
        expected = plain[f"{name}.weight"] + layer.lora.delta()
        assert torch.equal(merged_local(layer), expected) and torch.equal(sources[f"{name}.weight"], expected)
        assert torch.equal(layer.weight, plain[f"{name}.weight"])
        assert not torch.equal(expected, layer.weight)


def test_logits_are_those_of_transformers_in_four_bits(directory: Path, world: World) -> None:
    found, reference = logits_of(loaded(directory, world), world), load_in_4bit(directory)
    with torch.no_grad():
        expected = reference(torch.tensor(IDS)).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_reference_in_four_bits_computes_in_fp32_on_this_processor(directory: Path, tmp_path: Path) -> None:
    """As transformers does with the weights that four bits leave; a layer that multiplies in bf16 is 4e-3 away."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(dequantised(directory, tmp_path / "plain"), dtype=torch.float32)
    reference = load_in_4bit(directory)
    with torch.no_grad():
        found, expected = (model(torch.tensor(IDS)).logits for model in (reference, plain))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_is_the_model_that_computes(family: str, world: World, tmp_path: Path) -> None:
    """Each projection as bitsandbytes has it, the rest to the bit; transformers' logits of it all, and a gradient."""
    from transformers import AutoModelForCausalLM

    family_model(family, tmp_path / "base", **FAMILIES[family])
    model = loaded(tmp_path / "base", world)
    export(model, str(tmp_path / "base"), tmp_path / "out", world)
    before, after = SafetensorsReader(tmp_path / "base"), SafetensorsReader(tmp_path / "out")
    assert before.names() == after.names()
    for name in before.names():
        packed = name.endswith("_proj.weight") or ".experts." in name
        expected = in_four_bits(before.whole(name)) if packed else before.whole(name)
        assert torch.equal(after.whole(name), expected), name
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, attn_implementation="eager")
    expected_BTV = reference(torch.tensor(IDS)).logits
    [part] = microbatches(Batch(ids=IDS), world, 2)
    with megatron_device():
        found_BTV = model(part)[..., : model.shape.vocab_size]
    torch.testing.assert_close(found_BTV, expected_BTV, rtol=1e-4, atol=1e-4)
    direction_BTV = torch.randn(expected_BTV.shape)
    # Through every block, down to the residual stream that enters the first one.
    embedding, norm = model.embedding.word_embeddings.weight, model.decoder.layers[0].input_layernorm.weight
    wanted = reference.model.embed_tokens.weight, reference.model.layers[0].input_layernorm.weight
    for one, other in zip(
        torch.autograd.grad(found_BTV, (embedding, norm), direction_BTV),
        torch.autograd.grad(expected_BTV, wanted, direction_BTV),
        strict=True,
    ):
        assert float((one[: len(other)] - other).norm() / other.norm()) <= 1e-4


def test_equal_files_give_equal_codes_whatever_the_dtype_of_training(directory: Path, world: World) -> None:
    one, other = (quantized(loaded(directory, world, dtype)) for dtype in ("float32", "bfloat16"))
    for name in one:
        assert torch.equal(one[name].codes, other[name].codes) and torch.equal(one[name].scales, other[name].scales)


def test_what_is_in_four_bits_already_stays_as_it_is(directory: Path, world: World) -> None:
    for layer in quantized(loaded(directory, world)).values():
        before = layer.weight
        layer.take(before)
        assert torch.equal(layer.weight, before)


def test_a_weight_that_is_no_number_is_found_before_it_is_handed_over(directory: Path, world: World) -> None:
    model = loaded(directory, world)
    layer: Any = linears(model)["decoder.layers.1.mlp.linear_fc1"]
    check_finite(Sources(model, world).checked, world)
    broken = layer.weight
    broken[3, 40] = float("nan")
    layer.take(broken)
    with pytest.raises(NotFinite, match="the scales of decoder.layers.1.mlp.linear_fc1.weight"):
        check_finite(Sources(model, world).checked, world)


def test_a_part_of_the_inputs_has_the_numbers_of_the_whole(model: Any) -> None:
    """What tensor parallelism cuts a layer's inputs into."""
    whole: Any = linears(model)["decoder.layers.0.self_attention.linear_proj"]
    weight_OI = torch.randn(whole.weight.shape)
    whole.take(weight_OI)
    for rank, part_OI in enumerate(weight_OI.split(BLOCK, dim=1)):
        part: Any = type(whole)(BLOCK, len(part_OI), config=model.config, init_method=None, bias=False,
                                input_is_parallel=True, skip_bias_add=True)  # fmt: skip
        assert isinstance(part, QuantizedLinear)
        part.take(part_OI)
        assert torch.equal(part.weight, whole.weight[:, rank * BLOCK : (rank + 1) * BLOCK])


@pytest.mark.parametrize(
    ("sizes", "layout", "found"),
    [
        ({"hidden_size": 96}, {}, "lora.quantize=nf4 for 96 hidden dimensions on 1 rank"),
        ({}, {}, "lora.quantize=nf4 for 96 feed-forward columns on 1 rank"),
        ({"ffn_hidden_size": 192}, {"tp": 2}, "lora.quantize=nf4 for 192 feed-forward columns on 2 ranks"),
        ({"ffn_hidden_size": 256}, {"tp": 4}, "lora.quantize=nf4 for 128 dimensions of all heads on 4 ranks"),
        ({"experts": Experts(8, 2, 32)}, {}, "lora.quantize=nf4 for 32 feed-forward columns on 1 rank"),
    ],
)
def test_widths_that_blocks_do_not_divide_are_refused(
    sizes: dict[str, Any], layout: dict[str, int], found: str
) -> None:
    shape = ModelShape(**{**vars(SHAPE), **sizes})
    config = LoraConfig(rank=4, targets=["q_proj"], quantize=NF4)
    with pytest.raises(LayoutError, match=found) as refusal:
        check_lora(config, shape, ParallelConfig(**layout))
    assert f"a multiple of {BLOCK}" in str(refusal.value)
    check_lora(LoraConfig(rank=4, targets=["q_proj"]), shape, ParallelConfig(**layout))


@pytest.mark.parametrize(("layout", "key"), [({"etp": 4}, "parallel.etp"), ({"tp": 2}, "parallel.tp")])
def test_the_remedy_names_what_cuts_the_experts(layout: dict[str, int], key: str) -> None:
    shape = ModelShape(**{**vars(SHAPE), "experts": Experts(8, 2, BLOCK)})
    with pytest.raises(LayoutError) as refusal:
        check_lora(LoraConfig(rank=4, targets=["q_proj"], quantize=NF4), shape, ParallelConfig(**layout))
    assert refusal.value.remedy == f"lower {key}"


def test_without_bitsandbytes_the_check_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = ModelShape(**{**vars(SHAPE), "ffn_hidden_size": 128})
    check_lora(CONFIG, shape, ParallelConfig())
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(VersionError, match="no bitsandbytes") as refusal:
        check_lora(CONFIG, shape, ParallelConfig())
    assert isinstance(refusal.value, NlaError) and "pip install" in refusal.value.remedy
