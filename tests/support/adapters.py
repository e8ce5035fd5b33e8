"""Adapters as `peft` makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def peft_adapter(base: Path, out: Path, options: dict[str, Any], seed: int) -> None:
    """An adapter of the model in `base`, with B away from zero; `options` are those of `LoraConfig`."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    source = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(source, LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
    model.save_pretrained(out)
