"""What adapters compute, learn and save on every layout that four ranks can have, against `peft`.

Two bases are in 4-bit weights: beside one is transformers' in those that bitsandbytes makes, beside the other, whose
experts transformers leaves as they are, one with its weights as four bits have them.

Arguments: RESULT SCRATCH. Rank 0 writes, per layout and adapter, the largest differences found.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from safetensors.torch import load_file
from torch import Tensor

from nla_megatron.config.schema import OptimConfig, ParallelConfig
from nla_megatron.conversion.hf import SafetensorsReader, read_shape
from nla_megatron.conversion.live import Exporter, load_from_hf
from nla_megatron.conversion.merge import merge
from nla_megatron.conversion.peft import attach, load_adapter, merged_exporter, save_adapter
from nla_megatron.conversion.peft_format import WEIGHTS
from nla_megatron.models.batching import Batch, response_mask
from nla_megatron.models.decoder import build_chunks
from nla_megatron.models.lora import adapter_state
from nla_megatron.models.lora_spec import LoraSpec
from nla_megatron.models.pipeline import forward_rows
from nla_megatron.models.quantized import NF4, NONE
from nla_megatron.models.verbalizer import Verbalizer, build_verbalizer
from nla_megatron.parallel.collectives import barrier
from nla_megatron.parallel.cpu import megatron_device
from nla_megatron.parallel.world import World, initialise
from nla_megatron.training.checkpoint import save_sharded
from nla_megatron.training.losses import cross_entropy
from nla_megatron.training.module import TrainModule
from nla_megatron.types import Microbatch
from tests.support.adapters import peft_adapter
from tests.support.families import family_model
from tests.support.quantized import dequantised, load_in_4bit
from tests.support.tiny import tiny_model

LAYOUTS = [(2, 1), (1, 1), (1, 2), (2, 2), (4, 1)]
"""The first one also saves the checkpoints that the others read."""
FEWER = {"some": [(2, 1), (2, 2)], "nf4": [(2, 1), (2, 2), (4, 1)]}
"""Layouts of the other adapters, for what only their options, or their base's 4-bit weights, touch."""
PROMPT, STEPS = 4, 2
LENGTHS = (9, 14, 7, 11, 12)
OPTIM = OptimConfig(lr=1e-2, warmup_steps=0, schedule="constant", clip_grad=0.5)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"r": 4, "lora_alpha": 8, "target_modules": ALL},
    "some": {
        "r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"],
        "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"down_proj": 32},
    },
    "nf4": {"r": 4, "lora_alpha": 8, "target_modules": ALL},
}  # fmt: skip
FAMILIES = {"gemma3": ALL, "llama-biased": ALL, "qwen3-moe": ALL[:4], "nf4-moe": ALL[:4]}
"""Norms behind linear layers, biases, and mixtures, whose attention alone is adapted."""
FAMILY_LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2 pp2": {"tp": 2, "pp": 2}, "vpp2": {"pp": 2, "vpp": 2, "tp": 2}, "ep2 pp2": {"ep": 2, "pp": 2},
}  # fmt: skip
QUANTIZED = ("nf4", "nf4-moe")
"""Their bases are in 4-bit weights, and so wide that the inputs of each layer are whole blocks on every rank."""
WIDE_MIXTURE = {"hidden_size": 64, "head_dim": 16, "moe_intermediate_size": 128}


def make_sources(scratch: Path) -> None:
    """Random base models, and adapters as `peft` makes them, with B away from zero."""
    tiny_model(scratch / "base", num_layers=3, num_heads=8, num_kv_heads=4)
    tiny_model(scratch / base_of("nf4"), num_layers=3, num_heads=8, num_kv_heads=4, ffn_hidden_size=256)
    for name in FAMILIES:
        wide = name in QUANTIZED
        family_model("qwen3-moe" if wide else name, scratch / base_of(name), **(WIDE_MIXTURE if wide else {}))
    for name in QUANTIZED:
        dequantised(scratch / base_of(name), scratch / computing(name))
    adapters = {name: {"r": 4, "lora_alpha": 8, "target_modules": targets} for name, targets in FAMILIES.items()}
    for name, options in (ADAPTERS | adapters).items():
        make_adapter(scratch, computing(name), name, options)


def layouts_of(name: str) -> list[str]:
    """Of a family; dense ones have no experts to share out."""
    return [layout for layout, sizes in FAMILY_LAYOUTS.items() if "ep" not in sizes or name.endswith("moe")]


def quantize_of(name: str) -> str:
    return NF4 if name in QUANTIZED else NONE


def base_of(name: str) -> str:
    """The directory that an adapter's model is loaded from."""
    return f"{name}_base" if name in QUANTIZED or name in FAMILIES else "base"


def computing(name: str) -> str:
    """The directory with the weights that it then computes with."""
    return f"{name}_four_bits" if name in QUANTIZED else base_of(name)


def make_adapter(scratch: Path, base: str, name: str, options: dict[str, Any]) -> None:
    peft_adapter(scratch / base, scratch / name, options, seed=1)
    merge(scratch / base, scratch / name, scratch / f"{name}_merged")


def batch_of(vocab_size: int) -> Batch:
    rng = np.random.default_rng(7)
    ids = [rng.integers(3, vocab_size, length).tolist() for length in LENGTHS]
    return Batch(ids=ids, fields={"mask": response_mask([PROMPT] * len(ids), list(LENGTHS), max(LENGTHS))})


def logits_of(model: Any, batch: Batch, world: World, vocab_size: int) -> Tensor:
    """(N, T, V) on every rank."""

    def collect(logits_BTV: Tensor, part: Microbatch) -> Tensor:
        full = gather_from_tensor_model_parallel_region(logits_BTV)[..., :vocab_size]
        return torch.nn.functional.pad(full, (0, 0, 0, max(LENGTHS) - full.shape[1])).flatten(1)

    rows = forward_rows(model, batch, world, 2, collect, max(LENGTHS) * vocab_size)
    return rows.view(len(LENGTHS), max(LENGTHS), vocab_size)


def adapter_tensors(model: Any, directory: Path, shape: Any, world: World) -> dict[str, Tensor]:
    save_adapter(model, directory, shape, world, "base")
    return load_file(directory / WEIGHTS)


def weights(exporter: Exporter) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in exporter.tensors()}


def loaded(scratch: Path, name: str, world: World) -> Any:
    base = scratch / base_of(name)
    shape = read_shape(base)
    model = build_verbalizer(shape, world, "float32", quantize_of(name))
    load_from_hf(model, str(base), shape, world, with_head=True)
    load_adapter(model, scratch / name, shape, world)
    return model


def on_layout(scratch: Path, name: str, world: World, key: str) -> dict[str, Any]:
    """Numbers of one layout: logits, the adapter and both exports, before and after training."""
    from megatron.core import dist_checkpointing

    shape = read_shape(scratch / base_of(name))
    batch = batch_of(shape.vocab_size)
    model = loaded(scratch, name, world)
    out: dict[str, Any] = {"logits": logits_of(model, batch, world, shape.vocab_size)}
    out["saved"] = adapter_tensors(model, scratch / "out" / f"{key} saved", shape, world)
    out["merged"] = weights(merged_exporter(model, shape, world, with_head=True))
    module = TrainModule(model, world, OPTIM, STEPS, 2, "float32")
    total, checkpoint = float(batch.fields["mask"].sum()), scratch / f"{name}_checkpoint"
    out["norms"] = []
    for step in range(STEPS):
        out["norms"].append(module.update(batch, cross_entropy(total), ("loss",), step).grad_norm)
        if step == 0 and (world.tp, world.pp) == LAYOUTS[0]:
            for part in ("module", "adapter"):
                (checkpoint / part).mkdir(parents=True, exist_ok=True)
            barrier(world)
            save_sharded(module.state(loading=False), checkpoint / "module")
            save_sharded({"model": adapter_state(model)}, checkpoint / "adapter")
    out["trained"] = adapter_tensors(model, scratch / "out" / f"{key} trained", shape, world)
    out["base"] = weights(Exporter(model, shape, world, with_head=True))

    again = TrainModule(loaded(scratch, name, world), world, OPTIM, STEPS, 2, "float32")
    with megatron_device():
        again.load_state(dist_checkpointing.load(again.state(loading=True), str(checkpoint / "module")))
    again.update(batch, cross_entropy(total), ("loss",), 1)
    out["resumed"] = adapter_tensors(again.model, scratch / "out" / f"{key} resumed", shape, world)
    with megatron_device(), torch.no_grad():
        state = dist_checkpointing.load({"model": adapter_state(again.model)}, str(checkpoint / "adapter"))
        again.model.load_state_dict(state["model"], strict=False)
    out["stepped"] = adapter_tensors(again.model, scratch / "out" / f"{key} stepped", shape, world)
    return out


def fresh(scratch: Path, world: World, key: str) -> dict[str, Any]:
    """Adapters as `attach` starts them."""
    shape = read_shape(scratch / "base")
    model = build_verbalizer(shape, world, "float32")
    load_from_hf(model, str(scratch / "base"), shape, world, with_head=True)
    batch = batch_of(shape.vocab_size)
    before = logits_of(model, batch, world, shape.vocab_size)
    attach(model, shape, world, LoraSpec(4, 8.0), seed=5)
    after = logits_of(model, batch, world, shape.vocab_size)
    tensors = adapter_tensors(model, scratch / "out" / f"{key} fresh", shape, world)
    return {"unchanged": torch.equal(before, after), "tensors": tensors}


def in_family(scratch: Path, name: str, world: World, key: str) -> dict[str, Any]:
    """The same without training, on a list of chunks."""
    base = scratch / base_of(name)
    shape = read_shape(base)
    chunks = build_chunks(partial(Verbalizer, quantize=quantize_of(name)), shape, world, "float32")
    load_from_hf(chunks, str(base), shape, world, with_head=True)
    load_adapter(chunks, scratch / name, shape, world)
    out: dict[str, Any] = {"saved": adapter_tensors(chunks, scratch / "out" / f"{key} saved", shape, world)}
    out["merged"] = weights(merged_exporter(chunks, shape, world, with_head=True))
    out["base"] = weights(Exporter(chunks, shape, world, with_head=True))
    if len(chunks) == 1:
        out["logits"] = logits_of(chunks[0], batch_of(shape.vocab_size), world, shape.vocab_size)
    return out


def family_reference(scratch: Path, name: str) -> dict[str, Any]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(
        scratch / computing(name), dtype=torch.float32, attn_implementation="eager"
    )
    model = PeftModel.from_pretrained(base, scratch / name)
    with torch.no_grad():
        logits = [model(torch.tensor(row)[None]).logits[0] for row in batch_of(base.config.vocab_size).ids]
    return {"logits": logits, "saved": load_file(scratch / name / WEIGHTS)}


def reference(scratch: Path, name: str) -> dict[str, Any]:
    """The same by `peft` and torch's AdamW on one process."""
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    if quantize_of(name) == NF4:
        base = load_in_4bit(scratch / base_of(name))
    else:
        base = AutoModelForCausalLM.from_pretrained(scratch / "base", dtype=torch.float32)
    batch = batch_of(base.config.vocab_size)
    model = PeftModel.from_pretrained(base, scratch / name, is_trainable=True)

    def state() -> dict[str, Tensor]:
        return {key: value.detach().clone() for key, value in get_peft_model_state_dict(model).items()}

    rows = [torch.tensor(row)[None] for row in batch.ids]
    with torch.no_grad():
        out: dict[str, Any] = {"logits": [model(row).logits[0] for row in rows], "saved": state(), "norms": []}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=OPTIM.lr, betas=(OPTIM.beta1, OPTIM.beta2), weight_decay=0.0)
    for step in range(STEPS):
        logs = [torch.log_softmax(model(row).logits[0], -1)[:-1].gather(-1, row[0, 1:, None]) for row in rows]
        loss = -torch.cat([log[PROMPT - 1 :, 0] for log in logs]).mean()
        optimizer.zero_grad()
        loss.backward()
        out["norms"].append(float(torch.nn.utils.clip_grad_norm_(trainable, OPTIM.clip_grad)))
        optimizer.step()
        if step == 0:
            out["stepped"] = state()
    return {**out, "trained": state()}


def largest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


def distance(found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """The largest error of a matrix as a share of how far training has moved it.

    Adam divides by a gradient's own size: where one is rounding alone, so is the direction of its update. Such
    elements are few, and a norm over a matrix does not see them; a wrong or missing part of a gradient it does.
    """
    return max(float((found[name] - expected[name]).norm() / (expected[name] - start[name]).norm()) for name in start)


def exports(found: dict[str, Any], expected: dict[str, Any], scratch: Path, base: str, name: str) -> dict[str, Any]:
    """What was written and computed without training."""

    def read(directory: str) -> dict[str, Tensor]:
        reader = SafetensorsReader(scratch / directory)
        return {one: reader.whole(one) for one in reader.names()}

    out = {
        "saved": largest(found["saved"], expected["saved"]),
        "merged": largest(found["merged"], read(f"{name}_merged")),
        "merged_moves": largest(read(f"{name}_merged"), read(base)),
        "base": largest(found["base"], read(base)),
    }
    if "logits" in found:
        pairs = zip(found["logits"], expected["logits"], strict=True)
        scale = max(float(one.abs().max()) for one in expected["logits"])
        out["logits"] = max(float((a[: len(b)] - b).abs().max()) for a, b in pairs) / scale
    return out


def compare(found: dict[str, Any], expected: dict[str, Any], scratch: Path, name: str) -> dict[str, Any]:
    return exports(found, expected, scratch, computing(name), name) | {
        "norms": [abs(a - b) / b for a, b in zip(found["norms"], expected["norms"], strict=True)],
        "trained": distance(found["trained"], expected["trained"], expected["saved"]),
        "stepped": distance(found["stepped"], expected["stepped"], expected["saved"]),
        "resumed": distance(found["resumed"], expected["trained"], expected["stepped"]),
    }


def main(result: str, scratch: str) -> None:
    from megatron.core import parallel_state

    found: dict[str, Any] = {}
    starts: dict[str, Any] = {}
    for tp, pp in LAYOUTS:
        world = initialise(ParallelConfig(tp=tp, pp=pp))
        if world.is_main and not (Path(scratch) / "base").exists():
            make_sources(Path(scratch))
        barrier(world)
        key = f"tp{tp} pp{pp}"
        for name in (name for name in ADAPTERS if (tp, pp) in FEWER.get(name, LAYOUTS)):
            found[f"{name} {key}"] = on_layout(Path(scratch), name, world, f"{name} {key}")
        starts[key] = fresh(Path(scratch), world, key)
        parallel_state.destroy_model_parallel()
    families: dict[str, Any] = {}
    for layout, sizes in FAMILY_LAYOUTS.items():
        world = initialise(ParallelConfig(**sizes))
        for name in (name for name in FAMILIES if layout in layouts_of(name)):
            families[f"{name} {layout}"] = in_family(Path(scratch), name, world, f"{name} {layout}")
        parallel_state.destroy_model_parallel()
    if world.is_main:
        expected = {name: reference(Path(scratch), name) for name in ADAPTERS}
        out: dict[str, Any] = {
            key: compare(numbers, expected[key.split()[0]], Path(scratch), key.split()[0])
            for key, numbers in found.items()
        }
        for name in FAMILIES:
            wanted = family_reference(Path(scratch), name)
            for layout in layouts_of(name):
                key = f"{name} {layout}"
                out[key] = exports(families[key], wanted, Path(scratch), computing(name), name)
        first = next(iter(starts.values()))["tensors"]
        for key, start in starts.items():
            out[f"fresh {key}"] = {"unchanged": start["unchanged"], "differs": largest(start["tensors"], first)}
        Path(result).write_text(json.dumps(out))
    barrier(world)


if __name__ == "__main__":
    main(*sys.argv[1:3])
