"""Reading SAEs: directories of `sae_lens` (cfg.json and sae_weights.safetensors, versions 3 to 6), or bare safetensors.

What a file asks for is honoured or refused by name; nothing is guessed. Factors that a file keeps apart (a decoder's
norms, fine-tuned scales, the norm that inputs are brought to) are folded into the weights.
Legend: D hidden, M features.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nla_megatron.errors import CheckpointError, ConfigError, MissingFile, UnsupportedModel
from nla_megatron.interventions.sae import ARCHITECTURES, NORMALISATIONS, Sae
from nla_megatron.interventions.spec import EMBEDDING
from nla_megatron.reading import read_json

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_AGAIN = "download or export the SAE again"
_MIN_NORM = 1e-8
_FOLDED = "expected_average_only_in"  # one factor for all inputs, known to whoever trained the SAE


@dataclass(frozen=True)
class SaeFormat:
    """What an SAE's weights do not say of themselves; a bare safetensors file needs one, a directory has its own.

    Args:
        architecture: one of `sae.ARCHITECTURES`.
        apply_b_dec_to_input: the decoder's bias is subtracted before encoding.
        normalisation: one of `sae.NORMALISATIONS`, or "expected_average_only_in".
        k: of topk.
        layer: the block whose output it reads, "embedding", or None where nobody says.
        rescaled_by_decoder_norm: of topk: features compete by their size in the stream, not by their activation.
        scaled_features: the weights hold a factor per feature.
    """

    architecture: str
    apply_b_dec_to_input: bool
    normalisation: str = "none"
    k: int | None = None
    layer: int | str | None = None
    rescaled_by_decoder_norm: bool = False
    scaled_features: bool = False


def load_sae(path: Path | str, bare: SaeFormat | None = None, input_factor: float | None = None) -> Sae:
    """An SAE in fp32.

    Args:
        path: a directory of `sae_lens`, or a safetensors file with the same names of tensors.
        bare: for a file that is not beside its cfg.json.
        input_factor: what inputs are multiplied by before encoding, for "expected_average_only_in".

    Raises:
        MissingFile: no such directory or file, or one without its weights.
        UnsupportedModel: an architecture, activation, normalisation or place in the model that is not honoured.
        CheckpointError: damaged files, tensors missing or of other shapes, or numbers that are not finite.
        ConfigError: `bare` or `input_factor` is needed and missing, or given and not needed.
    """
    path = Path(path)
    if not path.exists():
        raise MissingFile(f"no '{path}'", f"a directory with {CONFIG} and {WEIGHTS}, or a file", "check the SAE's path")
    config_path, weights_path = (path / CONFIG, path / WEIGHTS) if path.is_dir() else (path.with_name(CONFIG), path)
    if bare is None and (path.is_dir() or config_path.is_file()):
        config = _read_config(config_path)
        shape = (config.get("d_in"), config.get("d_sae"))
        return _build(
            read_format(config, str(config_path)), _read_tensors(weights_path), shape, input_factor, str(weights_path)
        )
    if bare is None or path.is_dir():
        raise ConfigError(
            f"'{path}' {'with' if bare else 'without'} an SaeFormat",
            f"one for a file that is not beside its {CONFIG}, none for a directory",
            "name the directory that sae_lens wrote, or a file and its SaeFormat",
        )  # fmt: skip
    return _build(bare, _read_tensors(weights_path), (None, None), input_factor, str(weights_path))


def read_format(config: Mapping[str, Any], source: str) -> SaeFormat:
    """What a cfg.json says, whichever version wrote it.

    Raises:
        UnsupportedModel: something that would not be honoured.
    """
    metadata = config.get("metadata") or {}
    activation = config.get("activation_fn_str", config.get("activation_fn", "relu"))
    options = config.get("activation_fn_kwargs") or {}
    architecture = config.get("architecture", "standard")
    if (architecture, activation) == ("standard", "topk"):
        architecture = "topk"
    hook = metadata.get("hook_name", config.get("hook_name", config.get("hook_point")))
    _supported("architecture", architecture, ARCHITECTURES, source)
    _supported("activation_fn", activation, ("relu", "topk") if architecture == "topk" else ("relu",), source)
    _supported("reshape_activations", config.get("reshape_activations", "none"), ("none",), source)
    normalisation = config.get("normalize_activations") or "none"
    normalisation = _FOLDED if normalisation is True else normalisation
    _supported("normalize_activations", normalisation, (*NORMALISATIONS, _FOLDED), source)
    if architecture != "topk":
        _supported("rescale_acts_by_decoder_norm", config.get("rescale_acts_by_decoder_norm", False), (False,), source)
    _supported("normalize_decoder", bool(config.get("normalize_decoder", False)), (False,), source)
    return SaeFormat(
        architecture=architecture,
        apply_b_dec_to_input=bool(config.get("apply_b_dec_to_input", True)),
        normalisation=normalisation,
        k=config.get("k", options.get("k")),
        layer=None if hook is None else layer_of(hook, source),
        rescaled_by_decoder_norm=bool(config.get("rescale_acts_by_decoder_norm", False)),
        scaled_features=bool(config.get("finetuning_scaling_factor", False)),
    )


def layer_of(hook: str, source: str) -> int | str:
    """Where in the residual stream a hook's name is: the block whose output it reads, or "embedding".

    Raises:
        UnsupportedModel: another place, such as attention's output.
    """
    after = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post|(?:model\.|language_model\.)*layers\.(\d+)", hook)
    before = re.fullmatch(r"blocks\.(\d+)\.hook_resid_pre", hook)
    if after:
        return int(after[1] or after[2])
    if before and int(before[1]):
        return int(before[1]) - 1
    if before or hook == "hook_embed":
        return EMBEDDING
    raise UnsupportedModel(
        f"an SAE for {hook!r} in '{source}'", "one for the residual stream: blocks.N.hook_resid_post or hook_resid_pre",
        "use an SAE of the residual stream",
    )  # fmt: skip


def _supported(key: str, value: object, allowed: tuple[object, ...], source: str) -> None:
    if value not in allowed:
        raise UnsupportedModel(
            f"{key}={value!r} in '{source}'", f"one of {', '.join(map(str, allowed))}", "use another SAE"
        )


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise MissingFile(f"no '{path}'", f"a directory with {CONFIG} and {WEIGHTS}", "check the SAE's path")
    config = read_json(path, CheckpointError, _AGAIN)
    if not isinstance(config, dict):
        raise CheckpointError(f"a {type(config).__name__} in '{path}'", "a mapping", _AGAIN)
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise MissingFile(f"no '{path}'", "the SAE's weights", "check the SAE's path")
    try:
        tensors = {name: values.float() for name, values in load_file(path).items()}
    except SafetensorError as error:
        raise CheckpointError(f"'{path}': {error}", "a safetensors file", _AGAIN) from error
    wrong = sorted(name for name, values in tensors.items() if not torch.isfinite(values).all())
    if wrong:
        raise CheckpointError(f"NaN or inf in {', '.join(wrong)} of '{path}'", "finite weights", _AGAIN)
    if "log_threshold" in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    if "scaling_factor" in tensors:  # its older name
        tensors["finetuning_scaling_factor"] = tensors.pop("scaling_factor")
    return tensors


def _build(
    form: SaeFormat,
    tensors: Mapping[str, Tensor],
    shape: tuple[int | None, int | None],
    input_factor: float | None,
    source: str,
) -> Sae:
    _supported("architecture", form.architecture, ARCHITECTURES, source)
    _supported("normalize_activations", form.normalisation, (*NORMALISATIONS, _FOLDED), source)
    _check_tensors(form, tensors, shape, source)
    gated = form.architecture == "gated"
    encoder, decoder, bias = tensors["W_enc"], tensors["W_dec"], tensors["b_dec"]
    encoder_bias = tensors["b_mag" if gated else "b_enc"]
    if form.rescaled_by_decoder_norm:
        norm_M = decoder.norm(dim=-1).clamp_min(_MIN_NORM)  # a feature without a direction stays one
        encoder, encoder_bias, decoder = encoder * norm_M, encoder_bias * norm_M, decoder / norm_M[:, None]
    if "finetuning_scaling_factor" in tensors:
        decoder = decoder * tensors["finetuning_scaling_factor"][:, None]
    if (form.normalisation == _FOLDED) != (input_factor is not None):
        raise ConfigError(
            f"normalize_activations={form.normalisation!r} in '{source}' with input_factor={input_factor}",
            f"an input_factor for {_FOLDED!r}, none otherwise",
            "pass √D over the mean norm of the SAE's training inputs, or fold it in with sae_lens",
        )  # fmt: skip
    if input_factor is not None:
        encoder, decoder, bias = encoder * input_factor, decoder / input_factor, bias / input_factor
    return Sae(
        architecture=form.architecture,
        encoder_DM=encoder.contiguous(),
        encoder_bias_M=encoder_bias,
        decoder_MD=decoder.contiguous(),
        decoder_bias_D=bias,
        centre_D=bias if form.apply_b_dec_to_input else torch.zeros_like(bias),
        normalisation="none" if form.normalisation == _FOLDED else form.normalisation,
        threshold_M=tensors.get("threshold") if form.architecture == "jumprelu" else None,
        k=form.k if form.architecture == "topk" else None,
        gate_bias_M=tensors["b_gate"] if gated else None,
        gain_M=tensors["r_mag"].exp() if gated else None,
        layer=form.layer,
    )


def _check_tensors(
    form: SaeFormat, tensors: Mapping[str, Tensor], shape: tuple[int | None, int | None], source: str
) -> None:
    encoder = tensors.get("W_enc")
    if encoder is None or encoder.ndim != 2:
        found = None if encoder is None else tuple(encoder.shape)
        raise CheckpointError(f"W_enc of shape {found} in '{source}'", "(hidden, features)", _AGAIN)
    width, features = (given or size for given, size in zip(shape, encoder.shape, strict=True))
    wanted = {"W_enc": (width, features), "W_dec": (features, width), "b_dec": (width,)}
    extra = {"jumprelu": ("b_enc", "threshold"), "gated": ("b_gate", "r_mag", "b_mag")}
    wanted |= {name: (features,) for name in extra.get(form.architecture, ("b_enc",))}
    if form.scaled_features:
        wanted["finetuning_scaling_factor"] = (features,)
    for name, size in wanted.items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != size:
            raise CheckpointError(
                f"{name} of shape {found} in '{source}'", f"{size}, of a {form.architecture} SAE", _AGAIN
            )
    unused = sorted(set(tensors) - set(wanted))
    scale = tensors.get("finetuning_scaling_factor")
    if unused == ["finetuning_scaling_factor"] and scale is not None and bool((scale == 1).all()):
        return  # written for a while by sae_lens for every SAE
    if unused:
        raise CheckpointError(
            f"{', '.join(unused)} in '{source}'", f"only {', '.join(wanted)}, of a {form.architecture} SAE",
            "name the SAE's architecture rightly, or export it again",
        )  # fmt: skip
    if form.architecture == "topk" and not (isinstance(form.k, int) and 1 <= form.k <= features):
        raise CheckpointError(f"k={form.k} of a topk SAE in '{source}'", f"1 to {features}", _AGAIN)
