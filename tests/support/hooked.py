"""A transformers model whose residual stream is changed by hooks, token by token and by hand: what samplers must equal.

Nothing here is taken from the package's own formulas. Legend: T tokens, D hidden, M features of an SAE.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Formula = Callable[[Tensor, Tensor, float], Tensor]
"""(stream of one token (D,), vector (D,), strength) -> the stream after it (D,)."""


def norm_add(x: Tensor, v: Tensor, s: float) -> Tensor:
    return x + s * (x * x).sum().sqrt() / (v * v).sum().sqrt() * v


def replace(x: Tensor, v: Tensor, s: float) -> Tensor:
    return s / (v * v).sum().sqrt() * v


def add(x: Tensor, v: Tensor, s: float) -> Tensor:
    return x + s * v


@dataclass(frozen=True)
class PlainSae:
    """f = relu(x W_enc + b_enc), x̂ = f W_dec + b_dec, and the three ways to steer with it."""

    w: dict[str, Tensor]

    def encode(self, x: Tensor) -> Tensor:
        return (x @ self.w["W_enc"] + self.w["b_enc"]).clamp_min(0)

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.w["W_dec"] + self.w["b_dec"]

    def features(self, chosen: Sequence[int], max_acts: Sequence[float]) -> Formula:
        def change(x: Tensor, v: Tensor, s: float) -> Tensor:
            f = self.encode(x)
            error, steered = x - self.decode(f), f.clone()
            for index, most in zip(chosen, max_acts, strict=True):
                steered[index] = most * s
            return self.decode(steered) + error

        return change

    def clamp(self, chosen: int, max_act: float) -> Formula:
        def change(x: Tensor, v: Tensor, s: float) -> Tensor:
            unit = self.w["W_dec"][chosen] / self.w["W_dec"][chosen].norm()
            return x - (x @ unit) * unit + max_act * s * unit

        return change

    def scaled(self, x: Tensor, v: Tensor, s: float) -> Tensor:
        f = self.encode(x)
        return self.decode(s * f) + x - self.decode(f)


def write_sae(directory: Path, width: int, features: int = 24) -> PlainSae:
    """A random SAE in the files of `sae_lens`."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / math.sqrt(shape[-1])

    tensors = {
        "W_enc": draw(width, features),
        "b_enc": draw(features),
        "W_dec": draw(features, width),
        "b_dec": draw(width),
    }
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "architecture": "standard",
        "d_in": width,
        "d_sae": features,
        "apply_b_dec_to_input": False,
        "dtype": "float32",
    }
    (directory / "cfg.json").write_text(json.dumps(config))
    save_file(tensors, directory / "sae_weights.safetensors")
    return PlainSae(tensors)


@dataclass(frozen=True)
class Change:
    """One intervention by hand: `strength(t)` of the token at position t, None where it is left alone."""

    layer: int | str
    formula: Formula
    vector_D: Tensor
    strength: Callable[[int], float | None]


class Hooked:
    """The model of a directory, in fp32."""

    def __init__(self, directory: Path):
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    @torch.no_grad()
    def logprobs(
        self, prompt: Sequence[int], response: Sequence[int], changes: Sequence[Change], temperature: float = 1.0
    ) -> Tensor:
        """Log-probs of the response's tokens, (len(response),)."""
        return self.scores(prompt, response, changes, temperature)

    def scores(
        self, prompt: Sequence[int], response: Sequence[int], changes: Sequence[Change], temperature: float = 1.0
    ) -> Tensor:
        """The same, with a gradient."""
        rows_TV = self.distributions(prompt, response, changes, temperature)
        return rows_TV.gather(-1, torch.tensor(response)[:, None])[:, 0]

    def distributions(
        self, prompt: Sequence[int], response: Sequence[int], changes: Sequence[Change], temperature: float = 1.0
    ) -> Tensor:
        """Log-probs of all tokens in the place of each of the response's, (len(response), V)."""
        handles = [self._hook(change) for change in changes]
        ids = torch.tensor([*prompt, *response])
        logits = self.model(ids[None]).logits[0] / temperature
        for handle in handles:
            handle.remove()
        return torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]

    def _hook(self, change: Change) -> Any:
        def changed(stream_1TD: Tensor) -> Tensor:
            tokens = list(stream_1TD[0])
            for t, x in enumerate(tokens):
                strength = change.strength(t)
                if strength is not None:
                    tokens[t] = change.formula(x, change.vector_D, strength)
            return torch.stack(tokens)[None]

        def before(module: Any, inputs: Any) -> Any:
            return (changed(inputs[0]), *inputs[1:])

        def after(module: Any, inputs: Any, output: Any) -> Any:
            return (changed(output[0]), *output[1:]) if isinstance(output, tuple) else changed(output)

        layers = self.model.model.layers
        if change.layer == "embedding":
            return layers[0].register_forward_pre_hook(before)
        return layers[int(change.layer)].register_forward_hook(after)
