"""Sparse autoencoders one number at a time, in Python floats: what the tensors are compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def make_tensors(architecture: str, d: int, m: int, seed: int) -> Tensors:
    """Random weights under the names of a file. Shapes: D hidden, M features."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {"W_enc": draw(d, m), "W_dec": draw(m, d), "b_dec": draw(d) / 2}
    if architecture == "gated":
        return tensors | {"b_gate": draw(m) / 2, "r_mag": draw(m) / 4, "b_mag": draw(m) / 2}
    tensors["b_enc"] = draw(m) / 2
    return tensors | ({"threshold": draw(m).abs()} if architecture == "jumprelu" else {})


class SlowSae:
    """Encodes and decodes one token as sae_lens documents it; `options` are those of its cfg.json."""

    def __init__(self, tensors: Mapping[str, Tensor], **options: object):
        self.w: dict[str, list] = {name: values.double().tolist() for name, values in tensors.items()}
        self.architecture = str(options.get("architecture", "standard"))
        self.centred = bool(options.get("apply_b_dec_to_input", True))
        self.normalisation = str(options.get("normalize_activations", "none"))
        self.k = int(str(options.get("k", 1)))
        self.rescaled = bool(options.get("rescale_acts_by_decoder_norm", False))
        self.input_factor = float(str(options.get("input_factor", 1.0)))
        self.d, self.m = len(self.w["W_enc"]), len(self.w["W_dec"])

    def statistics(self, x: list[float]) -> tuple[float, float, float]:
        """Shift, divisor on the way in, factor on the way out."""
        if self.normalisation == "layer_norm":
            mean = sum(x) / self.d
            deviation = math.sqrt(sum((value - mean) ** 2 for value in x) / (self.d - 1))
            return mean, deviation + 1e-5, deviation
        if self.normalisation == "constant_norm_rescale":
            size = math.sqrt(sum(value**2 for value in x)) / math.sqrt(self.d)
            return 0.0, size, size
        return 0.0, 1 / self.input_factor, 1 / self.input_factor

    def encode(self, x: list[float]) -> list[float]:
        shift, divisor, _ = self.statistics(x)
        centre = self.w["b_dec"] if self.centred else [0.0] * self.d
        inner = [(value - shift) / divisor - c for value, c in zip(x, centre, strict=True)]
        dot = [sum(inner[i] * self.w["W_enc"][i][j] for i in range(self.d)) for j in range(self.m)]
        if self.architecture == "gated":
            magnitude = [dot[j] * math.exp(self.w["r_mag"][j]) + self.w["b_mag"][j] for j in range(self.m)]
            return [max(magnitude[j], 0.0) if dot[j] + self.w["b_gate"][j] > 0 else 0.0 for j in range(self.m)]
        pre = [dot[j] + self.w["b_enc"][j] for j in range(self.m)]
        if self.architecture == "jumprelu":
            return [max(pre[j], 0.0) if pre[j] > self.w["threshold"][j] else 0.0 for j in range(self.m)]
        if self.architecture == "topk":
            if self.rescaled:
                pre = [pre[j] * self.norm(j) for j in range(self.m)]
            kept = sorted(range(self.m), key=lambda j: -pre[j])[: self.k]
            return [max(pre[j], 0.0) if j in kept else 0.0 for j in range(self.m)]
        return [max(value, 0.0) for value in pre]

    def norm(self, j: int) -> float:
        return math.sqrt(sum(value**2 for value in self.w["W_dec"][j]))

    def decode(self, f: list[float], x: list[float]) -> list[float]:
        shift, _, factor = self.statistics(x)
        scale = self.w.get("finetuning_scaling_factor", [1.0] * self.m)
        f = [f[j] * scale[j] / (self.norm(j) if self.rescaled else 1.0) for j in range(self.m)]
        out = [sum(f[j] * self.w["W_dec"][j][i] for j in range(self.m)) + self.w["b_dec"][i] for i in range(self.d)]
        return [value * factor + shift for value in out]

    def direction(self, j: int) -> list[float]:
        return [value / self.norm(j) for value in self.w["W_dec"][j]]

    def steered(self, x: list[float], change: Callable[[list[float]], list[float]]) -> list[float]:
        """Features changed, decoded, and what the SAE does not explain put back."""
        f = self.encode(x)
        error = [value - decoded for value, decoded in zip(x, self.decode(f, x), strict=True)]
        return [new + e for new, e in zip(self.decode(change(f), x), error, strict=True)]


def each(function: Callable[[list[float]], list[float]], stream_TD: Tensor) -> Tensor:
    """A function of one token on every token, in fp64."""
    return torch.tensor([function(row) for row in stream_TD.double().tolist()], dtype=torch.float64)
