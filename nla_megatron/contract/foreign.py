"""Checkpoints of the two public NLA trainers: what their sidecars leave unsaid, and by which convention it is filled.

A reader that guessed would inject at the wrong place and scale, or shift every AR prompt by one token, in silence. So
nothing is filled in unless the trainer is named, or the values are given.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nla_megatron.contract.blocks import InjectionSpec, ModelExtraction
from nla_megatron.contract.sidecar import DatasetSidecar, ModelSidecar, model_sidecar_path
from nla_megatron.errors import ConfigError, SidecarError

AR_ADAPTER, AR_META, VALUE_HEAD = "ar_lora_value_head.safetensors", "ar_meta.json", "value_head.safetensors"
TOKEN_EMBEDDING = -1


@dataclass(frozen=True)
class Convention:
    """What a trainer always does and does not write down.

    `bos_policy`: whether AR prompts get the tokenizer's special tokens. `injection`: None where the sidecar's
    `injection_scale` is the norm that replaces the marker's embedding.
    """

    injection: InjectionSpec | None
    bos_policy: str
    told: str


TRAINERS = {
    "kitft": Convention(
        None,
        "tokenizer",
        "replaces the token embedding at extraction.injection_scale; AR prompts with the tokenizer's BOS",
    ),
    "easynla": Convention(
        InjectionSpec("norm_add", 1, 1.0), "none", "norm_add at block 1, scale 1; AR prompts without BOS"
    ),
}
"""kitft/natural_language_autoencoders and asherps/EasyNLA."""


def model_of_dataset(dataset: DatasetSidecar, directory: Path) -> ModelSidecar:
    """The sidecar of a checkpoint beside which the sidecar of its training data was left.

    An AR is known by its head. The stage is not recorded; it is given as `sl`.

    Raises:
        SidecarError: a base table's sidecar, which records no prompts.
    """
    if dataset.tokens is None or dataset.prompt_templates is None:
        raise SidecarError(
            f"{str(model_sidecar_path(directory))!r} is of a base table, without tokens and prompt_templates",
            "the sidecar of the table that the model was trained on", "copy that one here",
        )  # fmt: skip
    return ModelSidecar(
        role=role_of(directory),
        stage="sl",
        base_checkpoint=dataset.extraction.base_model,
        d_model=dataset.extraction.d_model,
        extraction=ModelExtraction(layer_index=dataset.extraction.layer_index),
        tokens=dataset.tokens,
        prompt_templates=dataset.prompt_templates,
        bos_policy=dataset.bos_policy,
        av_prompt=dataset.av_prompt,
        injection=dataset.injection,
        trained_on=(dataset.dataset_id,) if dataset.dataset_id else (),
        created_at=dataset.created_at,
        created_by=dataset.created_by,
        git_commit=dataset.git_commit,
    )


def role_of(directory: Path) -> str:
    """`ar` for a directory with an AR's head, in whatever form; else `av`."""
    return "ar" if any((directory / name).is_file() for name in (VALUE_HEAD, AR_ADAPTER, AR_META)) else "av"


def completed(
    sidecar: ModelSidecar,
    source: str,
    *,
    trainer: str | None = None,
    injection: InjectionSpec | None = None,
    bos_policy: str | None = None,
    layer_index: int | None = None,
) -> ModelSidecar:
    """A sidecar with everything that ours says: from the file first, then as given, then by the trainer's convention.

    Args:
        source: the directory, for messages.
        trainer: a key of `TRAINERS`.
        layer_index: block K of the activations, where the file has none.

    Raises:
        ConfigError: an unknown trainer.
        SidecarError: a value that is still missing, with the conventions to choose from; or one that is given and
            differs from the file's.
    """
    if trainer is not None and trainer not in TRAINERS:
        raise ConfigError(f"trainer={trainer!r}", f"one of {', '.join(TRAINERS)}", "name one, or give the values")
    convention = TRAINERS[trainer] if trainer is not None else None
    given: dict[str, Any] = {"bos_policy": bos_policy, "injection": injection, "layer_index": layer_index}
    recorded: dict[str, Any] = {
        "bos_policy": sidecar.bos_policy,
        "injection": sidecar.injection,
        "layer_index": sidecar.extraction.layer_index,
    }
    for key, value in given.items():
        if value is not None and recorded[key] not in (None, value):
            raise SidecarError(
                f"{key} = {recorded[key]} in the sidecar of {source}", f"{value}, as given", f"drop {key}"
            )
    filled = {key: recorded[key] if recorded[key] is not None else value for key, value in given.items()}
    if convention is not None:
        filled["bos_policy"] = filled["bos_policy"] or convention.bos_policy
        if sidecar.role == "av":
            filled["injection"] = filled["injection"] or _injection(convention, sidecar)
    needed = ["bos_policy", "layer_index", *(["injection"] if sidecar.role == "av" else [])]
    if missing := [key for key in needed if filled[key] is None]:
        raise SidecarError(
            f"the sidecar of {source} does not say {' and '.join(missing)}",
            "; ".join(f"trainer={name}: {one.told}" for name, one in TRAINERS.items()),
            f"name the trainer that wrote it, or give {' and '.join(missing)}",
        )
    return replace(
        sidecar,
        bos_policy=filled["bos_policy"],
        injection=filled["injection"] if sidecar.role == "av" else None,
        extraction=replace(sidecar.extraction, layer_index=filled["layer_index"]),
    )


def _injection(convention: Convention, sidecar: ModelSidecar) -> InjectionSpec | None:
    if convention.injection is not None:
        return convention.injection
    scale = sidecar.extraction.injection_scale
    return None if scale is None else InjectionSpec("replace", TOKEN_EMBEDDING, scale)
