"""A steered policy by hand: transformers with hooks, an MLP as formulas, and autograd through both.

Nothing of the package computes here. Legend: T tokens, D hidden, F strengths of one intervention, S of all.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nla_megatron.config.schema import OptimConfig
from nla_megatron.conversion.hf import read_shape
from nla_megatron.conversion.live import load_from_hf
from nla_megatron.interventions.schedules import Schedule
from nla_megatron.interventions.spec import Intervention
from nla_megatron.models.batching import Batch, response_mask
from nla_megatron.models.decoder import build_chunks
from nla_megatron.models.interventions import intervene
from nla_megatron.models.strength import PredictorConfig, dropout_seed
from nla_megatron.models.verbalizer import Verbalizer
from nla_megatron.parallel.world import World
from nla_megatron.training.strengths import StrengthPolicy
from tests.support import hooked
from tests.support.tiny import tiny_model

BLOCKS, STEP, SEED = 5, 3, 11
PROMPTS, LENGTHS = (6, 8, 5, 6, 7), (11, 15, 9, 12, 8)
"""The first and the fourth row answer the same prompt; the last answers with one token, which is never an input."""
OPTIM = OptimConfig(lr=0.0, warmup_steps=0, schedule="constant", clip_grad=0.0)
FORM = PredictorConfig(hidden=12, layers=2, dropout=0.0, activation="tanh", least=-1.0, most=3.0, scale=0.5)
FORMS = {
    "deep": PredictorConfig(hidden=10, layers=3, dropout=0.0, activation="gelu", scale=0.3),
    "dropout": PredictorConfig(hidden=16, layers=2, dropout=0.3, activation="relu", initial=1.0),
}

By = tuple[Callable[[hooked.PlainSae, Tensor, Tensor], Tensor], int | str, Callable[[int, int], float | None], int]
"""(stream after it from SAE, stream and strengths, place, factor of a token given the prompt's length, F)."""


def features(chosen: Sequence[int], most: Sequence[float]) -> Callable[[hooked.PlainSae, Tensor, Tensor], Tensor]:
    def change(sae: hooked.PlainSae, x: Tensor, s: Tensor) -> Tensor:
        f = sae.encode(x)
        steered = f.clone()
        for index, (feature, act) in enumerate(zip(chosen, most, strict=True)):
            steered[feature] = act * s[index]
        return sae.decode(steered) + x - sae.decode(f)

    return change


def clamp(chosen: Sequence[int], most: Sequence[float]) -> Callable[[hooked.PlainSae, Tensor, Tensor], Tensor]:
    def change(sae: hooked.PlainSae, x: Tensor, s: Tensor) -> Tensor:
        unit = torch.stack([sae.w["W_dec"][feature] / sae.w["W_dec"][feature].norm() for feature in chosen])
        return x + torch.linalg.pinv(unit) @ (torch.tensor(most) * s - unit @ x)

    return change


def scaled(sae: hooked.PlainSae, x: Tensor, s: Tensor) -> Tensor:
    f = sae.encode(x)
    return sae.decode(s[0] * f) + x - sae.decode(f)


def everywhere(t: int, prompt: int) -> float | None:
    return 1.0


def after_prompt(t: int, prompt: int) -> float | None:
    return None if t < prompt else 1.0


def in_prompt(t: int, prompt: int) -> float | None:
    return 1.0 if t < prompt else None


def decoding(t: int, prompt: int) -> float | None:
    return None if t < prompt else 0.8 * (1 - 1.5 * min(t - prompt, 4) / 4)


def training(t: int, prompt: int) -> float | None:
    return None if t < prompt else 0.3 * (1.0 - 0.5 * (1 - math.cos(math.pi * STEP / 6)) / 2)


BY_HAND: dict[str, By] = {
    "single": (features((3,), (1.5,)), 1, after_prompt, 1),
    "several": (features((3, 7, 9), (1.5, 0.5, 1.0)), 2, everywhere, 3),
    "clamp": (clamp((5, 2), (2.0, 1.0)), 0, in_prompt, 2),
    "global": (scaled, 4, after_prompt, 1),
    "decode": (features((1,), (1.0,)), 3, decoding, 1),
    "training": (clamp((4,), (1.0,)), "embedding", training, 1),
}
CASES: dict[str, tuple[str, ...]] = {name: (name,) for name in BY_HAND} | {"layers": tuple(BY_HAND)}
CASES |= {name: ("several", "global") for name in FORMS}


def interventions(case: str, sae: Path) -> tuple[Intervention, ...]:
    """The same as the package has them."""
    steering: dict[str, Any] = {"sae": str(sae)}
    every = {
        "single": Intervention(1, "features", "generated", features=(3,), max_acts=(1.5,), **steering),
        "several": Intervention(2, "features", "all", features=(3, 7, 9), max_acts=(1.5, 0.5, 1.0), **steering),
        "clamp": Intervention(0, "clamp", "prompt", features=(5, 2), max_acts=(2.0, 1.0), **steering),
        "global": Intervention(4, "global", "generated", **steering),
        "decode": Intervention(
            3, "features", "generated", 0.8, Schedule("linear", "decode", 1.0, -0.5, 4), features=(1,), **steering
        ),
        "training": Intervention(
            "embedding", "clamp", "generated", 0.3, Schedule("cosine", "training", 1.0, 0.5, 6), features=(4,),
            **steering,
        ),
    }  # fmt: skip
    return tuple(every[name] for name in CASES[case])


def form_of(case: str) -> PredictorConfig:
    return FORMS.get(case, FORM)


def rows() -> list[list[int]]:
    rng = np.random.default_rng(7)
    ids = [rng.integers(3, 600, length).tolist() for length in LENGTHS]
    ids[3][: PROMPTS[3]] = ids[0][: PROMPTS[0]]
    return ids


def batch(**options: Any) -> Batch:
    mask = response_mask(PROMPTS, LENGTHS, max(LENGTHS))
    return Batch(ids=rows(), fields={"mask": mask}, prompt_lengths=PROMPTS, training_step=STEP, **options)


def prepare(scratch: Path) -> tuple[Path, Path]:
    """Model and SAE, where they are not there yet."""
    directory, sae = scratch / "model", scratch / "sae"
    if not directory.exists():
        tiny_model(directory, num_layers=BLOCKS)
        hooked.write_sae(sae, read_shape(directory).hidden_size)
    return directory, sae


def policy_of(case: str, directory: Path, sae: Path, world: World, optim: OptimConfig = OPTIM) -> StrengthPolicy:
    shape, wanted = read_shape(directory), interventions(case, sae)
    chunks = build_chunks(Verbalizer, shape, world, "float32")
    load_from_hf(chunks, str(directory), shape, world, with_head=True)
    intervene(chunks, wanted)
    return StrengthPolicy(chunks, wanted, form_of(case), world, optim, 5, 2, SEED)


def checksum(policy: StrengthPolicy) -> str:
    """Of all weights of the frozen model that this rank holds."""
    digest = hashlib.sha256()
    for chunk in policy.chunks:
        for name, values in chunk.named_parameters():
            digest.update(name.encode() + values.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def masks_of(policy: StrengthPolicy) -> dict[tuple[int, ...], Tensor] | None:
    """Which units dropout keeps for each prompt, scaled: drawn as `StrengthPredictor` says that they are."""
    form = policy.predictor.config
    if not form.dropout:
        return None
    masks = {}
    for row, prompt in zip(rows(), PROMPTS, strict=True):
        ids = tuple(row[:prompt])
        drawn = torch.rand(form.hidden, generator=torch.Generator().manual_seed(dropout_seed(SEED, STEP, ids)))
        masks[ids] = (drawn >= form.dropout) / (1 - form.dropout)
    return masks


@dataclass(frozen=True)
class Found:
    """What a case gives: features of the prompts, strengths, log-probs of the responses and gradients by name."""

    features: Tensor
    strengths: Tensor
    logprobs: list[Tensor]
    gradients: dict[str, Tensor]
    loss: float


class ByHand:
    """The reference of all cases."""

    def __init__(self, directory: Path, sae: Path):
        from safetensors.torch import load_file

        self.hooked = hooked.Hooked(directory)
        self.sae = hooked.PlainSae(load_file(sae / "sae_weights.safetensors"))

    def run(
        self, case: str, weights: Mapping[str, Tensor], masks: Mapping[tuple[int, ...], Tensor] | None = None
    ) -> Found:
        """Of the mean negative log-likelihood of the responses.

        Args:
            weights: the predictor's, by name.
            masks: for the prompts, which units of the first layer dropout keeps, scaled.
        """
        learned = {name: values.detach().clone().requires_grad_() for name, values in weights.items()}
        ids = rows()
        prompts = [tuple(row[:prompt]) for row, prompt in zip(ids, PROMPTS, strict=True)]
        read = torch.stack([self._features(prompt) for prompt in prompts])
        chosen = torch.stack(
            [
                self._strengths(case, learned, features_D, None if masks is None else masks[prompt])
                for features_D, prompt in zip(read, prompts, strict=True)
            ]
        )
        logprobs = [
            self.hooked.scores(row[:prompt], row[prompt:], self._changes(case, chosen[index], prompt))
            for index, (row, prompt) in enumerate(zip(ids, PROMPTS, strict=True))
        ]
        loss = -torch.cat(logprobs).mean()
        self.hooked.model.zero_grad()
        loss.backward()
        gradients = {name: values.grad for name, values in learned.items() if values.grad is not None}
        return Found(read, chosen.detach(), [each.detach() for each in logprobs], gradients, float(loss.detach()))

    @torch.no_grad()
    def _features(self, prompt: Sequence[int]) -> Tensor:
        states = self.hooked.model(torch.tensor([list(prompt)]), output_hidden_states=True).hidden_states
        mean: Tensor = states[-1][0].mean(0)
        return mean

    def _strengths(self, case: str, w: Mapping[str, Tensor], hidden: Tensor, mask: Tensor | None) -> Tensor:
        form = form_of(case)
        functions: dict[str, Callable[[Tensor], Tensor]] = {
            "tanh": torch.tanh,
            "relu": lambda x: x.clamp_min(0),
            "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
        }
        for layer in range(form.layers):
            hidden = w[f"linears.{layer}.weight"] @ hidden + w[f"linears.{layer}.bias"]
            if layer + 1 < form.layers:
                hidden = functions[form.activation](hidden)
                hidden = hidden if mask is None else hidden * mask
        middle, half = (form.most + form.least) / 2, (form.most - form.least) / 2
        return form.scale * (torch.tanh(hidden) * half + middle)

    def _changes(self, case: str, strengths_S: Tensor, prompt: int) -> list[hooked.Change]:
        changes, first = [], 0
        for name in CASES[case]:
            formula, layer, factor, count = BY_HAND[name]
            own = strengths_S[first : first + count]
            first += count

            def change(x: Tensor, v: Tensor, s: float, formula: Any = formula, own: Tensor = own) -> Tensor:
                steered: Tensor = formula(self.sae, x, s * own)
                return steered

            changes.append(
                hooked.Change(layer, change, torch.zeros(1), lambda t, factor=factor: factor(t, prompt))  # type: ignore[misc]
            )
        return changes


def gradient_gap(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Largest difference of any entry, relative to the largest entry of the same tensor."""
    assert set(found) == set(wanted)
    return max(float((found[name] - each).abs().max() / each.abs().max()) for name, each in wanted.items())
