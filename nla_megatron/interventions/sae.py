"""Sparse autoencoders: a residual stream as features, and back. Everything is fp32.

Legend: T tokens, D hidden, M features of the SAE, F chosen ones.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from dataclasses import replace as with_fields
from typing import Any

import torch
from torch import Tensor

from nla_megatron.errors import ConfigError, WidthError

ARCHITECTURES = ("standard", "jumprelu", "topk", "gated")
NORMALISATIONS = ("none", "layer_norm", "constant_norm_rescale")
_LAYER_NORM_EPS = 1e-5  # as the SAEs were trained
_MIN_NORM = 1e-12


@dataclass(frozen=True)
class Sae:
    """f = act((x' - centre) W_enc + b_enc), x̂' = f W_dec + b_dec, where x' is x normalised and x̂ is undone from x̂'.

    Activations: `standard` relu(p); `jumprelu` relu(p) where p > threshold; `topk` relu of the k largest p; `gated`
    relu((x' - centre) W_enc * gain + b_enc) where (x' - centre) W_enc + b_gate > 0.

    Args:
        architecture: one of `ARCHITECTURES`.
        encoder_DM, encoder_bias_M, decoder_MD, decoder_bias_D: fp32.
        centre_D: subtracted before encoding: the decoder's bias, or zeros.
        normalisation: "none", "layer_norm" (mean and unbiased deviation of each token) or "constant_norm_rescale"
            (each token to norm √D).
        threshold_M: of `jumprelu`.
        k: of `topk`.
        gate_bias_M, gain_M: of `gated`; its `encoder_bias_M` is the magnitudes'.
        layer: the block whose output the SAE reads, "embedding", or None where its files do not say.
    """

    architecture: str
    encoder_DM: Tensor
    encoder_bias_M: Tensor
    decoder_MD: Tensor
    decoder_bias_D: Tensor
    centre_D: Tensor
    normalisation: str = "none"
    threshold_M: Tensor | None = None
    k: int | None = None
    gate_bias_M: Tensor | None = None
    gain_M: Tensor | None = None
    layer: int | str | None = None

    @property
    def width(self) -> int:
        """D."""
        return self.encoder_DM.shape[0]

    @property
    def num_features(self) -> int:
        """M."""
        return self.encoder_DM.shape[1]

    def to(self, device: torch.device | str) -> Sae:
        """The same SAE on a device."""
        values = ((each.name, getattr(self, each.name)) for each in fields(self))
        moved: dict[str, Any] = {name: value.to(device) for name, value in values if isinstance(value, Tensor)}
        return with_fields(self, **moved)

    def encode(self, stream_TD: Tensor) -> Tensor:
        """(T, D) of any dtype -> features (T, M)."""
        stream = stream_TD.float()
        shift_T1, divisor_T1, _ = self._statistics(stream)
        return self._activate(((stream - shift_T1) / divisor_T1 - self.centre_D) @ self.encoder_DM)

    def decode(self, features_TM: Tensor, stream_TD: Tensor) -> Tensor:
        """(T, M) -> (T, D), at the size and mean of the stream that was encoded."""
        shift_T1, _, size_T1 = self._statistics(stream_TD.float())
        return (features_TM @ self.decoder_MD + self.decoder_bias_D) * size_T1 + shift_T1

    def size(self, stream_TD: Tensor) -> Tensor:
        """By what a decoded change is multiplied: (T, 1), or (1, 1) ones without normalisation."""
        return self._statistics(stream_TD.float())[2]

    def columns(self, features_F: Tensor) -> Sae:
        """The SAE of some features only: each is as before. Not for `topk`, whose features compete."""
        assert self.architecture != "topk"
        names = ("encoder_bias_M", "threshold_M", "gate_bias_M", "gain_M")
        kept: dict[str, Any] = {
            name: values[features_F] for name in names if (values := getattr(self, name)) is not None
        }
        return with_fields(
            self,
            encoder_DM=self.encoder_DM[:, features_F].contiguous(),
            decoder_MD=self.decoder_MD[features_F],
            **kept,
        )

    def _statistics(self, stream_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Shift, divisor before encoding, and factor after decoding, each (T, 1) or (1, 1)."""
        if self.normalisation == "layer_norm":
            mean_T1, deviation_T1 = stream_TD.mean(-1, keepdim=True), stream_TD.std(-1, keepdim=True)
            return mean_T1, deviation_T1 + _LAYER_NORM_EPS, deviation_T1
        if self.normalisation == "constant_norm_rescale":
            size_T1 = stream_TD.norm(dim=-1, keepdim=True).clamp_min(_MIN_NORM) / stream_TD.shape[-1] ** 0.5
            return torch.zeros_like(size_T1), size_T1, size_T1
        one = stream_TD.new_ones(1, 1)
        return torch.zeros_like(one), one, one

    def _activate(self, product_TM: Tensor) -> Tensor:
        if self.architecture == "gated":
            assert self.gate_bias_M is not None and self.gain_M is not None
            open_TM = product_TM + self.gate_bias_M > 0
            return (product_TM * self.gain_M + self.encoder_bias_M).relu() * open_TM
        pre_TM = product_TM + self.encoder_bias_M
        if self.architecture == "topk":
            assert self.k is not None
            largest = pre_TM.topk(self.k, dim=-1)
            return torch.zeros_like(pre_TM).scatter(-1, largest.indices, largest.values.relu())
        if self.architecture == "jumprelu":
            assert self.threshold_M is not None
            return pre_TM.relu() * (pre_TM > self.threshold_M)
        return pre_TM.relu()


def check_sae(sae: Sae, features: tuple[int, ...], layer: int | str, hidden_size: int, name: str) -> None:
    """The SAE fits the model and the intervention that names it.

    Raises:
        WidthError: it reads another width than the model's stream.
        ConfigError: a feature it does not have, or it was trained at another layer.
    """
    if sae.width != hidden_size:
        raise WidthError(f"the SAE '{name}' is {sae.width} wide", f"{hidden_size}, the model's", "use this model's SAE")
    beyond = [feature for feature in features if feature >= sae.num_features]
    if beyond:
        raise ConfigError(
            f"features {beyond} of the SAE '{name}'", f"0 to {sae.num_features - 1}", "name features that it has"
        )
    if sae.layer is not None and sae.layer != layer:
        raise ConfigError(
            f"the SAE '{name}' at layer {layer!r}", f"layer {sae.layer!r}, where it was trained",
            "set the intervention's layer, or use that layer's SAE",
        )  # fmt: skip
