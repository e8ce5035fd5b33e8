"""Adapters in `peft`'s files: what is read and refused, merged bit for bit, and written so that `peft` loads it."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from nla_megatron.conversion.hf import SafetensorsReader, read_shape
from nla_megatron.conversion.live import load_from_hf
from nla_megatron.conversion.merge import merge
from nla_megatron.conversion.peft import attach, load_adapter, save_adapter
from nla_megatron.conversion.peft_format import CONFIG, WEIGHTS, PeftConfig, read_peft_config
from nla_megatron.conversion.safetensors_file import checksum
from nla_megatron.conversion.source import HuggingFaceSide
from nla_megatron.errors import CheckpointError, DiskFull, MissingFile, NlaError, RunDirectoryError, UnsupportedModel
from nla_megatron.models.lora_spec import LoraSpec
from nla_megatron.models.verbalizer import build_verbalizer
from nla_megatron.parallel.world import World
from tests.support.ranks import ROOT, environment
from tests.support.tiny import tiny_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
REGEX = r".*\.self_attn\.(q_proj|k_proj|v_proj|o_proj)|.*\.mlp\.(gate_proj|up_proj|down_proj)"
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": REGEX},
    "patterns": {
        "r": 4, "lora_alpha": 8, "target_modules": "all-linear",
        "rank_pattern": {r".*\.mlp\..*": 2, "k_proj": 6}, "alpha_pattern": {"self_attn.o_proj": 3},
    },
    "by block": {
        "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 3],
        "rank_pattern": {"model.layers.1.self_attn.q_proj": 2},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, base: Path) -> dict[str, Path]:
    """Adapters as `peft` makes and saves them, with B away from zero."""
    found = {}
    for name, options in OPTIONS.items():
        torch.manual_seed(2)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **options))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(std=0.1)
        found[name] = tmp_path_factory.mktemp("adapter")
        model.save_pretrained(found[name])
    return found


def altered(source: Path, target: Path, **changes: Any) -> Path:
    """The adapter with other values in its configuration."""
    target.mkdir()
    (target / WEIGHTS).write_bytes((source / WEIGHTS).read_bytes())
    (target / CONFIG).write_text(json.dumps({**json.loads((source / CONFIG).read_text()), **changes}))
    return target


def live(base: Path, world: World) -> Any:
    model, shape = build_verbalizer(read_shape(base), world, "float32"), read_shape(base)
    load_from_hf(model, str(base), shape, world, with_head=True)
    return model


def tensors(directory: Path) -> dict[str, Tensor]:
    reader = SafetensorsReader(directory)
    return {name: reader.whole(name) for name in reader.names()}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_merge_is_bit_for_bit_what_peft_merges(
    name: str, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    merge(base, adapters[name], tmp_path / "merged", shard_bytes=200_000)
    reference = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters[name])
    expected = reference.merge_and_unload().state_dict()
    found, before = tensors(tmp_path / "merged"), tensors(base)
    assert found.keys() == before.keys()
    assert [one for one in found if not torch.equal(found[one], expected[one])] == []
    assert (
        sum(not torch.equal(found[one], before[one]) for one in found) == len(load_file(adapters[name] / WEIGHTS)) / 2
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert torch.equal(
        again["model.layers.1.self_attn.q_proj.weight"], expected["model.layers.1.self_attn.q_proj.weight"]
    )
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def test_a_merge_into_bf16_rounds_the_fp32_sum_once(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    exact = tensors_of_merge(base, adapters["rslora"], tmp_path / "exact", None)
    rounded = tensors_of_merge(base, adapters["rslora"], tmp_path / "rounded", torch.bfloat16)
    assert {one.dtype for one in rounded.values()} == {torch.bfloat16}
    assert all(torch.equal(rounded[name], exact[name].bfloat16()) for name in exact)
    assert json.loads((tmp_path / "rounded" / "config.json").read_text())["dtype"] == "bfloat16"


def tensors_of_merge(base: Path, adapter: Path, out: Path, dtype: torch.dtype | None) -> dict[str, Tensor]:
    merge(base, adapter, out, dtype)
    return tensors(out)


def test_the_adapters_own_sidecar_and_tokenizer_go_along(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    adapter = altered(adapters["plain"], tmp_path / "adapter")
    for name in ("nla_meta.yaml", "chat_template.jinja"):
        (adapter / name).write_text("the adapter's")
    merge(base, adapter, tmp_path / "merged")
    for name in ("nla_meta.yaml", "chat_template.jinja"):
        assert (tmp_path / "merged" / name).read_text() == "the adapter's"


def test_a_refused_merge_leaves_nothing(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    other = tiny_model(tmp_path / "narrow", num_heads=2, num_kv_heads=2)
    with pytest.raises(CheckpointError, match=r"A and B of shapes .* for model.layers.0.self_attn.q_proj"):
        merge(other, adapters["plain"], tmp_path / "merged")
    shallow = tiny_model(tmp_path / "shallow", num_layers=2)
    with pytest.raises(CheckpointError, match=r"adapts model.layers.2.self_attn.q_proj"):
        merge(shallow, adapters["plain"], tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["narrow", "shallow"]
    (tmp_path / "merged").mkdir()
    with pytest.raises(RunDirectoryError, match="merged is there already"):
        merge(base, adapters["plain"], tmp_path / "merged")


def test_a_merge_that_was_broken_off_goes_on_and_notes_what_it_wrote(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    merge(base, adapters["plain"], whole, shard_bytes=100_000)
    told = json.loads((whole / "conversion.json").read_text())["tensors"]
    assert told.keys() == tensors(whole).keys()
    assert all(checksum(tensor) == told[name]["checksum"] for name, tensor in tensors(whole).items())
    partial = Path(f"{out}.partial")
    *finished, in_the_way = sorted(path.name for path in whole.glob("*.safetensors"))[:3]
    (partial / in_the_way).mkdir(parents=True)
    with pytest.raises(RunDirectoryError, match="Is a directory"):
        merge(base, adapters["plain"], out, shard_bytes=100_000)
    assert not out.exists()
    (partial / in_the_way).rmdir()
    deadline = time.monotonic() + 30
    while not all((partial / "journal" / f"{name}.json").is_file() for name in finished):
        assert time.monotonic() < deadline, "what was finished is noted in the background"
        time.sleep(0.01)
    before = {name: (partial / name).stat().st_mtime_ns for name in finished}
    with pytest.raises(RunDirectoryError, match="adapter="):
        merge(base, adapters["rslora"], out, shard_bytes=100_000)
    merge(base, adapters["plain"], out, shard_bytes=100_000)
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == before
    assert all((out / path.name).read_bytes() == path.read_bytes() for path in whole.glob("*.safetensors"))


def test_a_full_disk_ends_a_merge_by_name(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, limit[1]))
    try:
        with pytest.raises(DiskFull, match="File too large"):
            merge(base, adapters["plain"], tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not (tmp_path / "out").exists()


def test_a_damaged_adapter_is_refused(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    for number, file in enumerate((WEIGHTS, CONFIG)):
        bad = altered(adapters["plain"], tmp_path / f"bad{number}")
        (bad / file).write_bytes((bad / file).read_bytes()[:-10])
        with pytest.raises(CheckpointError, match=file):
            merge(base, bad, tmp_path / "merged")


@pytest.mark.parametrize("stored", [False, True])
def test_an_adapter_of_a_tied_output_layer_leaves_the_embedding_as_it_is(
    stored: bool, base: Path, tmp_path: Path
) -> None:
    """The result computes what `peft` computes without merging, and is a model that is read again."""
    if stored:
        base = Path(shutil.copytree(base, tmp_path / "base"))
        weights = load_file(base / "model.safetensors")
        save_file({**weights, HEAD: weights[EMBEDDING].clone()}, base / "model.safetensors", {"format": "pt"})
    torch.manual_seed(3)
    options = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    reference = get_peft_model(AutoModelForCausalLM.from_pretrained(base), options)
    reference.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = reference(ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(base)(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-3)
    assert torch.equal(tensors(tmp_path / "merged")[EMBEDDING], tensors(base)[EMBEDDING])
    side = HuggingFaceSide(tmp_path / "merged")
    assert not side.model.shape.tied_embeddings and HEAD in side.specs()


def test_a_tied_base_with_another_output_layer_is_refused_as_conversion_refuses_it(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    bad = Path(shutil.copytree(base, tmp_path / "base"))
    weights = load_file(bad / "model.safetensors")
    save_file({**weights, HEAD: weights[EMBEDDING] + 1}, bad / "model.safetensors", {"format": "pt"})
    for read in (lambda: merge(bad, adapters["plain"], tmp_path / "merged"), lambda: HuggingFaceSide(bad)):
        with pytest.raises(CheckpointError, match="other than model.embed_tokens.weight"):
            read()


def test_a_merge_whose_sum_is_not_finite_is_refused(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    bad = altered(adapters["plain"], tmp_path / "adapter")
    weights = load_file(bad / WEIGHTS)
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, bad / WEIGHTS)
    with pytest.raises(CheckpointError, match="NaN or infinity in .* with the adapter"):
        merge(base, bad, tmp_path / "merged")


def test_a_quantised_base_is_refused(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    quantised = tiny_model(tmp_path / "base")
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    weights = {name: one.to(torch.float8_e4m3fn) for name, one in load_file(quantised / "model.safetensors").items()}
    save_file(weights, quantised / "model.safetensors")
    with pytest.raises(UnsupportedModel, match="quantization_config"):
        merge(quantised, adapters["plain"], tmp_path / "merged")


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"lora_bias": True},
        {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"fan_in_fan_out": True},
        {"peft_type": "IA3"}, {"trainable_token_indices": [3]}, {"target_parameters": ["experts.gate_up_proj"]},
        {"layer_replication": [[0, 2]]}, {"a_key_of_tomorrow": 1}, {"use_qalora": True},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_honoured_is_refused_by_its_key(
    change: dict[str, Any], adapters: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModel, match=next(iter(change))):
        read_peft_config(altered(adapters["plain"], tmp_path / "adapter", **change))


def test_the_patterns_are_read_as_peft_reads_them(adapters: dict[str, Path]) -> None:
    """The ranks are those of the matrices that `peft` made."""
    for name in OPTIONS:
        config = read_peft_config(adapters[name])
        for key, tensor in load_file(adapters[name] / WEIGHTS).items():
            if "lora_A" in key:
                module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                assert config.rank_of(module) == tensor.shape[0], (name, module)
    patterns = read_peft_config(adapters["patterns"])
    assert patterns.scale_of("model.layers.2.self_attn.o_proj") == 3 / 4
    assert patterns.scale_of("model.layers.2.mlp.up_proj") == 8 / 2


def test_tensors_that_are_no_pairs_are_refused(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    held = load_file(adapters["plain"] / WEIGHTS)
    strange = altered(adapters["plain"], tmp_path / "strange")
    save_file({**held, "base_model.model.lm_head.modules_to_save.weight": torch.eye(2)}, strange / WEIGHTS)
    with pytest.raises(UnsupportedModel, match="modules_to_save"):
        merge(base, strange, tmp_path / "merged")
    half = altered(adapters["plain"], tmp_path / "half")
    lost = next(key for key in held if "lora_B" in key)
    save_file({key: tensor for key, tensor in held.items() if key != lost}, half / WEIGHTS)
    with pytest.raises(CheckpointError, match="only lora_A of model.layers"):
        merge(base, half, tmp_path / "merged")
    with pytest.raises(MissingFile, match="adapter_config.json"):
        merge(base, base, tmp_path / "merged")


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"lora_dropout": 0.1}, UnsupportedModel, "lora_dropout=0.1"),
        ({"r": 5}, CheckpointError, r"\(5, 64\)"),
        ({"rank_pattern": {"layers.1.self_attn.q_proj": 2}}, UnsupportedModel, "rank_pattern"),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 2}}, UnsupportedModel, "alpha_pattern"),
    ],
)
def test_an_adapter_that_a_live_model_cannot_hold_is_refused(
    change: dict[str, Any], kind: type[NlaError], message: str, world: World, base: Path, adapters: dict[str, Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    model = live(base, world)
    with pytest.raises(kind, match=message):
        load_adapter(model, altered(adapters["plain"], tmp_path / "adapter", **change), read_shape(base), world)
    assert not any(".lora." in name for name, _ in model.named_parameters())


def test_an_adapter_of_some_blocks_or_other_modules_is_refused(
    world: World, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    model, shape = live(base, world), read_shape(base)
    with pytest.raises(UnsupportedModel, match="q_proj adapted in 2 of 4 blocks"):
        load_adapter(model, adapters["by block"], shape, world)
    with pytest.raises(UnsupportedModel, match="an adapter of model.layers.2.self_attn.q_proj"):
        load_adapter(model, adapters["plain"], shape.truncated(2), world)
    strange = altered(adapters["plain"], tmp_path / "head")
    head = {f"base_model.model.lm_head.lora_{one}.weight": torch.ones(4, 4) for one in "AB"}
    save_file({**load_file(strange / WEIGHTS), **head}, strange / WEIGHTS)
    with pytest.raises(UnsupportedModel, match="an adapter of lm_head"):
        load_adapter(model, strange, shape, world)


@pytest.mark.parametrize("name", ["plain", "rslora", "patterns"])
def test_what_is_loaded_is_written_back_for_peft(
    name: str, world: World, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    model, shape = live(base, world), read_shape(base)
    load_adapter(model, adapters[name], shape, world)
    save_adapter(model, tmp_path / "adapter", shape, world, str(base))
    source, written = load_file(adapters[name] / WEIGHTS), load_file(tmp_path / "adapter" / WEIGHTS)
    assert written.keys() == source.keys()
    assert all(torch.equal(written[key], source[key]) for key in source)
    ids = torch.arange(3, 20)[None]
    logits = []
    for directory in (adapters[name], tmp_path / "adapter"):
        reference = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), directory)
        with torch.no_grad():
            logits.append(reference(ids).logits)
    assert torch.equal(*logits)
    assert not any(path.name.endswith(".partial") for path in tmp_path.iterdir())


def test_only_an_adapter_is_replaced_by_one(world: World, base: Path, tmp_path: Path) -> None:
    model, shape = live(base, world), read_shape(base)
    attach(model, shape, world, LoraSpec(2, 4.0, ("q_proj",)))
    for _ in range(2):
        save_adapter(model, tmp_path / "adapter", shape, world, "base")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "model.safetensors").touch()
    with pytest.raises(RunDirectoryError, match="precious, which holds no adapter"):
        save_adapter(model, tmp_path / "precious", shape, world, "base")
    assert (tmp_path / "precious" / "model.safetensors").is_file()


def test_peft_knows_every_key_that_is_written(world: World, base: Path, tmp_path: Path) -> None:
    model, shape = live(base, world), read_shape(base)
    spec = LoraSpec(8, 4.0, ("q_proj", "down_proj"), rslora=True, ranks={"down_proj": 2}, alphas={"q_proj": 3.0})
    attach(model, shape, world, spec)
    save_adapter(model, tmp_path / "adapter", shape, world, "org/base")
    raw = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    known = LoraConfig(**{key: value for key, value in raw.items() if key != "peft_type"})
    assert (known.base_model_name_or_path, known.r, known.lora_alpha, known.use_rslora) == ("org/base", 8, 4.0, True)
    assert set(known.target_modules) == {"q_proj", "down_proj"}
    found = read_peft_config(tmp_path / "adapter")
    assert found == PeftConfig(8, 4.0, True, 0.0, "org/base", {"down_proj": 2}, {"q_proj": 3.0})


def test_a_model_without_adapters_is_not_saved(world: World, base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="without adapters"):
        save_adapter(live(base, world), tmp_path / "adapter", read_shape(base), world, "base")
    assert list(tmp_path.iterdir()) == []


def test_the_tool_merges_and_says_what_is_wrong(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    tool = [sys.executable, str(ROOT / "tools" / "merge_lora.py"), f"base={base}", f"adapter={adapters['plain']}"]
    missing = subprocess.run(tool, env=environment(), capture_output=True, text=True, timeout=60)
    assert missing.returncode == 2 and missing.stderr.startswith("ConfigError: ") and "out" in missing.stderr
    done = subprocess.run([*tool, f"out={tmp_path / 'merged'}"], env=environment(), timeout=60)
    merge(base, adapters["plain"], tmp_path / "here")
    assert done.returncode == 0
    written = [(tmp_path / one / "model.safetensors").read_bytes() for one in ("merged", "here")]
    assert written[0] == written[1]
