"""The three ways to steer with an SAE, as formulas. Legend: N touched tokens, D hidden, M features, F chosen ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nla_megatron.errors import ConfigError
from nla_megatron.interventions.maths import FORMULAS, Formula
from nla_megatron.interventions.sae import Sae, check_sae
from nla_megatron.interventions.spec import Intervention

_MIN_INDEPENDENCE = 1e-4  # smallest eigenvalue of the directions' Gram matrix; two at cosine 0.9999 are below


def formula_of(intervention: Intervention, hidden_size: int, sae: Sae | None = None) -> Formula:
    """The formula of an intervention, ready for `maths.apply`.

    Args:
        sae: what the intervention's path holds, on the stream's device; None for vector modes.

    Raises:
        WidthError, ConfigError: the SAE does not fit, or clamped features point the same way.
    """
    if intervention.takes_vectors:
        return FORMULAS[intervention.formula]
    assert sae is not None
    check_sae(sae, intervention.features, intervention.layer, hidden_size, intervention.sae or "")
    if intervention.mode == "global":
        return Formula.adding(Global(sae))
    device = sae.encoder_DM.device
    features_F = torch.tensor(intervention.features, device=device)
    max_act_F = torch.tensor(intervention.max_acts or [1.0] * len(intervention.features), device=device)
    if intervention.mode == "clamp":
        return Formula.adding(Clamp.of(sae.decoder_MD[features_F], max_act_F))
    return Formula.adding(Features.of(sae, features_F, max_act_F))


@dataclass(frozen=True)
class Features:
    """dec(f') - dec(f), f' being f with some features at max_act * strength.

    Decoding is linear: only the chosen features' rows of the decoder count, and, but for `topk`, only their columns of
    the encoder. What the SAE does not explain of the stream is in neither term, so it stays.
    """

    sae: Sae
    chosen_F: Tensor
    rows_FD: Tensor
    max_act_F: Tensor

    @classmethod
    def of(cls, sae: Sae, features_F: Tensor, max_act_F: Tensor) -> Features:
        compete = sae.architecture == "topk"
        return cls(
            sae if compete else sae.columns(features_F),
            features_F if compete else torch.arange(len(features_F), device=features_F.device),
            sae.decoder_MD[features_F],
            max_act_F,
        )

    def __call__(self, stream_ND: Tensor, vectors_ND: Tensor, strength_NF: Tensor) -> Tensor:
        """(N, D), (unused), (N, F) -> (N, D)."""
        before_NF = self.sae.encode(stream_ND)[:, self.chosen_F]
        return (self.max_act_F * strength_NF - before_NF) @ self.rows_FD * self.sae.size(stream_ND)


@dataclass(frozen=True)
class Clamp:
    """The smallest change that sets the stream's component along every d̂ to max_act * strength.

    For one feature, h - (h·d̂)d̂ + max_act * strength * d̂. Directions of several features are not orthogonal: set one
    after the other they would spoil each other. `dual_FD` is the directions' pseudo-inverse: its row i has component 1
    along d̂ᵢ and 0 along the others.
    """

    unit_FD: Tensor
    dual_FD: Tensor
    max_act_F: Tensor

    @classmethod
    def of(cls, rows_FD: Tensor, max_act_F: Tensor) -> Clamp:
        """From rows of the decoder.

        Raises:
            ConfigError: the directions are linearly dependent, or nearly.
        """
        unit_FD = rows_FD.double() / rows_FD.double().norm(dim=-1, keepdim=True).clamp_min(torch.finfo().tiny)
        gram_FF = unit_FD @ unit_FD.T
        least = float(torch.linalg.eigvalsh(gram_FF)[0])
        if least < _MIN_INDEPENDENCE:
            raise ConfigError(
                f"clamped features whose decoder directions depend on each other (smallest eigenvalue {least:.1e})",
                "directions that can be set independently", "leave out features that point the same way",
            )  # fmt: skip
        return cls(unit_FD.float(), torch.linalg.solve(gram_FF, unit_FD).float(), max_act_F)

    def __call__(self, stream_ND: Tensor, vectors_ND: Tensor, strength_NF: Tensor) -> Tensor:
        """(N, D), (unused), (N, F) -> (N, D)."""
        return (self.max_act_F * strength_NF - stream_ND @ self.unit_FD.T) @ self.dual_FD


@dataclass(frozen=True)
class Global:
    """dec(s·f) - dec(f) = (s - 1)·f·W_dec: every feature scaled by one strength."""

    sae: Sae

    def __call__(self, stream_ND: Tensor, vectors_ND: Tensor, strength_N1: Tensor) -> Tensor:
        """(N, D), (unused), (N, 1) -> (N, D)."""
        features_NM = self.sae.encode(stream_ND)
        return (strength_N1 - 1) * (features_NM @ self.sae.decoder_MD) * self.sae.size(stream_ND)
