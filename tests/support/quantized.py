"""4-bit weights as bitsandbytes and transformers make them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def in_four_bits(weight: Tensor) -> Tensor:
    """What is left of a weight, fp32."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    return dequantize_4bit(*quantize_4bit(weight.float().contiguous(), blocksize=64, quant_type="nf4"))


def load_in_4bit(directory: Path) -> Any:
    """transformers' model with its linear layers in NF4, but for the output layer, computing in fp32 on any processor.

    In eval mode bitsandbytes' layers round inputs and scales to bf16 where the processor multiplies that itself,
    whatever the dtype that was asked for.
    """
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, quantization_config=options, device_map="cpu"
    )
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert layers and all(hasattr(layer, "support_avx512bf16_for_cpu") for layer in layers)
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return model


def dequantised(directory: Path, out: Path) -> Path:
    """A copy of a model's directory whose linear layers have been through four bits."""
    shutil.copytree(directory, out)
    weights = load_file(directory / "model.safetensors")
    packed = {name: in_four_bits(one) if "_proj.weight" in name else one for name, one in weights.items()}
    save_file(packed, out / "model.safetensors", {"format": "pt"})
    return out
