"""Between our sidecar fields and the shared YAML layout, in both directions, foreign spellings included."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import date
from typing import TYPE_CHECKING, Any

from nla_megatron.contract.blocks import AvPromptSpec, InjectionSpec, PoolSpec, PromptTemplates, as_yaml_block
from nla_megatron.contract.files import atomic_path
from nla_megatron.contract.prompts import INJECT
from nla_megatron.errors import MissingFile, SidecarError
from nla_megatron.reading import read_yaml
from nla_megatron.types import POOLINGS, VECTOR_MODES

if TYPE_CHECKING:
    from pathlib import Path

    from nla_megatron.contract.sidecar import DatasetSidecar, ModelSidecar

_VERSIONS = {"nla_dataset": (1,), "nla_model": (1, 2)}  # the last is the one written
TRAINING_STAGES = ("av_sft", "ar_sft", "rl")
_POLICIES = (None, "none", "tokenizer")
_ROLES = {"actor": "av", "critic": "ar"}
_FIELD = "{injection_char}"  # what the shared layout calls <INJECT>; the template around it is a format string
_REMEDY = "mend this key in the sidecar, or write the file again with the stage that made it"


def load(path: Path, *kinds: str) -> dict[str, Any]:
    """The YAML of a sidecar as a mapping, kind (one of `kinds`) and version checked.

    Raises:
        MissingFile: no such file.
        SidecarError: not YAML, not a mapping, another kind or version.
    """
    if not path.is_file():
        remedy = "copy the sidecar along with its table or checkpoint, or make both again"
        raise MissingFile(f"no file at {str(path)!r}", f"a sidecar of kind {kinds[0]}", remedy)
    raw = read_yaml(path, SidecarError, _REMEDY)
    if not isinstance(raw, Mapping):
        raise SidecarError(f"{str(path)!r} holds {raw!r}", "a YAML mapping", _REMEDY)
    kind = raw.get("kind")
    if kind not in kinds:
        raise SidecarError(f"'kind' in {str(path)!r} is {kind!r}", repr(kinds[0]), "give a file of this kind")
    if raw.get("schema_version") not in _VERSIONS[kind]:
        expected = " or ".join(str(version) for version in _VERSIONS[kind])
        raise SidecarError(f"'schema_version' in {str(path)!r} is {raw.get('schema_version')!r}", expected, _REMEDY)
    return dict(raw)


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write a sidecar so that it appears whole or not at all."""
    import yaml

    text = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True, width=120)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def dataset_fields(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """The fields of a `DatasetSidecar` as plain values."""
    templates = _templates_in(raw.get("prompt_templates"), path)
    return {**raw, "prompt_templates": templates}


def model_fields(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """The fields of a `ModelSidecar` as plain values. The block index has several homes in foreign files."""
    extraction = raw.get("extraction") or {}
    if not isinstance(extraction, Mapping):
        raise SidecarError(f"'extraction' in {str(path)!r} is {extraction!r}", "a mapping", _REMEDY)
    places = {"extraction.layer_index": extraction.get("layer_index")}
    places["extraction_layer_index"] = raw.get("extraction_layer_index")
    for block in ("critic", "ar"):
        for key in ("extraction_layer_index", "num_hidden_layers"):
            content = raw.get(block)
            places[f"{block}.{key}"] = content.get(key) if isinstance(content, Mapping) else None
    given = {place: index for place, index in places.items() if index is not None}
    layer_index = next(iter(given.values()), None)
    if any(index != layer_index for index in given.values()):
        raise SidecarError(f"{str(path)!r} names several block indices: {given}", "one block index", _REMEDY)
    return {
        **raw,
        "role": _ROLES.get(str(raw.get("role")), raw.get("role")),
        "prompt_templates": _templates_in(raw.get("prompt_templates"), path),
        "extraction": {**{key: _scale_in(key, value) for key, value in extraction.items()}, "layer_index": layer_index},
    }


def _scale_in(key: str, value: object) -> object:
    """Other trainers also write a scale as a string, and "raw" or "none" for no scale."""
    if key not in ("injection_scale", "mse_scale") or not isinstance(value, str) or value == "sqrt_d_model":
        return value
    if value in ("raw", "none"):
        return None
    try:
        return float(value)
    except ValueError:
        return value


def dataset_yaml(sidecar: DatasetSidecar) -> dict[str, Any]:
    """A data set's sidecar in the shared layout; unset blocks are left out, as strict readers want it."""
    block = as_yaml_block(sidecar)
    block["prompt_templates"] = _templates_out(sidecar.prompt_templates, "actor", "critic")
    _leave_unused(block)
    head = {"kind": "nla_dataset", "schema_version": _VERSIONS["nla_dataset"][-1], "dataset_id": block["dataset_id"]}
    return {key: value for key, value in {**head, **block}.items() if value is not None}


def model_yaml(sidecar: ModelSidecar) -> dict[str, Any]:
    """A model's sidecar in the shared layout."""
    block = as_yaml_block(sidecar)
    block["prompt_templates"] = _templates_out(sidecar.prompt_templates, "av", "ar")
    block["critic"] = {"extraction_layer_index": sidecar.extraction.layer_index}
    _leave_unused(block)
    head = {"kind": "nla_model", "schema_version": _VERSIONS["nla_model"][-1]}
    return {key: value for key, value in {**head, **block}.items() if value is not None}


def _leave_unused(block: dict[str, Any]) -> None:
    """A single block needs no list of blocks, a vector that enters as it is no projection, a fixed number no bounds."""
    optional = {
        "injection": ("layers", "projection"),
        "pool": ("least", "within"),
        "av_prompt": ("text", "date", "chat_options"),
    }
    for name, keys in optional.items():
        for key in keys:
            if block[name] is not None and block[name][key] is None:
                del block[name][key]


def dataset_id(sidecar: DatasetSidecar) -> str:
    """The same fields give the same id, whenever and from whichever commit they are written."""
    content = dataset_yaml(replace(sidecar, dataset_id="", created_at="", git_commit=""))
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return f"{sidecar.stage}_{digest[:16]}"


def check_dataset_values(sidecar: DatasetSidecar, path: Path, ours: bool = False) -> None:
    """Values the contract knows; `ours` adds what other trainers do not record.

    Raises:
        SidecarError: the first key with another value.
    """
    _one_of(path, "stage", sidecar.stage, ("base", *TRAINING_STAGES))
    _one_of(path, "extraction.norm", sidecar.extraction.norm, ("none",))
    _one_of(path, "bos_policy", sidecar.bos_policy, _POLICIES)
    _check_extensions(sidecar, path)
    if sidecar.baseline is not None:
        _at_least(path, "baseline.rows", sidecar.baseline.rows, 1)
    if sidecar.stage in TRAINING_STAGES:
        needed = {"tokens": sidecar.tokens, "prompt_templates": sidecar.prompt_templates}
        _present(path, {**needed, "bos_policy": sidecar.bos_policy} if ours else needed)


def check_model_values(sidecar: ModelSidecar, path: Path, ours: bool = False) -> None:
    """Values the contract knows; `ours` adds what other trainers do not record.

    Raises:
        SidecarError: the first key with another value.
    """
    _one_of(path, "role", sidecar.role, ("av", "ar"))
    _one_of(path, "stage", sidecar.stage, ("init", "sl", "rl"))
    _one_of(path, "bos_policy", sidecar.bos_policy, _POLICIES)
    _check_extensions(sidecar, path)
    if sidecar.reconstructor is not None:
        _one_of(path, "reconstructor.pooling", sidecar.reconstructor.pooling, POOLINGS)
        _at_least(path, "reconstructor.projection_layers", sidecar.reconstructor.projection_layers, 1)
        _share_below_1(path, "reconstructor.dropout", sidecar.reconstructor.dropout)
        if sidecar.reconstructor.layer is not None:
            _at_least(path, "reconstructor.layer", sidecar.reconstructor.layer, 0)
    if ours:
        needed: dict[str, object] = {"bos_policy": sidecar.bos_policy}
        _present(path, {**needed, "injection": sidecar.injection} if sidecar.role == "av" else needed)


def _one_of(path: Path, key: str, value: object, allowed: tuple[str | None, ...]) -> None:
    if value not in allowed:
        expected = " or ".join("null" if one is None else one for one in allowed)
        raise SidecarError(f"{key!r} in {str(path)!r} is {value!r}", expected, _REMEDY)


def _check_extensions(sidecar: DatasetSidecar | ModelSidecar, path: Path) -> None:
    if sidecar.av_prompt is not None:
        _check_av_prompt(path, sidecar.av_prompt, sidecar.prompt_templates)
    if sidecar.pool is not None:
        _one_of(path, "pool.method", sidecar.pool.method, ("mean", "stack"))
        _at_least(path, "pool.window", sidecar.pool.window, 2 if sidecar.pool.method == "stack" else 1)
        _check_bounds(path, sidecar.pool)
        if sidecar.pool.method == "stack" and sidecar.prompt_templates is not None:
            _one_marker_each(path, sidecar.prompt_templates.av.count(INJECT), sidecar.pool)
    if sidecar.injection is not None:
        blocks = sidecar.injection.blocks
        if not blocks or len(set(blocks)) != len(blocks) or blocks[0] != sidecar.injection.layer:
            raise SidecarError(
                f"'injection.layers' in {str(path)!r} is {list(blocks)}, with layer {sidecar.injection.layer}",
                "different blocks, the first of them that of 'injection.layer'", _REMEDY,
            )  # fmt: skip
        _check_projection(path, sidecar.injection)


def _check_av_prompt(path: Path, spec: AvPromptSpec, templates: PromptTemplates | None) -> None:
    _one_of(path, "av_prompt.format", spec.format, ("chat", "plain"))
    if spec.date is not None:
        try:
            date.fromisoformat(spec.date)
        except ValueError:
            raise SidecarError(
                f"'av_prompt.date' in {str(path)!r} is {spec.date!r}", "a day as 2026-01-31", _REMEDY
            ) from None
    if spec.text is not None and templates is not None and spec.text.count(INJECT) != templates.av.count(INJECT):
        raise SidecarError(
            f"'av_prompt.text' in {str(path)!r} has {INJECT} {spec.text.count(INJECT)} times",
            f"as often as the AV template, {templates.av.count(INJECT)} times", _REMEDY,
        )  # fmt: skip


def _check_projection(path: Path, injection: InjectionSpec) -> None:
    spec = injection.projection
    if (injection.method == "project") != (spec is not None):
        raise SidecarError(
            f"'injection' in {str(path)!r} has method {injection.method!r} with projection {spec}",
            "'injection.projection' with method 'project', and with no other", _REMEDY,
        )  # fmt: skip
    if spec is None:
        return
    _one_of(path, "injection.projection.then", spec.then, VECTOR_MODES)
    _at_least(path, "injection.projection.layers", spec.layers, 1)
    _share_below_1(path, "injection.projection.dropout", spec.dropout)
    if spec.dropout and spec.layers == 1:
        found = f"'injection.projection.dropout' in {str(path)!r} is {spec.dropout}, of a single layer"
        raise SidecarError(found, "0: it lies between layers", _REMEDY)


def _check_bounds(path: Path, pool: PoolSpec) -> None:
    """Rows with fewer activations than the window are those of a stack, which says how few they may be."""
    _one_of(path, "pool.within", pool.within, (None, "sentence"))
    if pool.least is not None and not (pool.method == "stack" and 1 <= pool.least < pool.window):
        raise SidecarError(
            f"'pool.least' in {str(path)!r} is {pool.least}, with method {pool.method!r} and window {pool.window}",
            "1 or more, below the window, with method 'stack'; absent where every row keeps the whole window", _REMEDY,
        )  # fmt: skip
    if pool.within is not None and pool.least is None:
        raise SidecarError(f"'pool.within' in {str(path)!r} without 'pool.least'", "both, or neither", _REMEDY)


def _one_marker_each(path: Path, markers: int, pool: PoolSpec) -> None:
    if pool.least is not None and markers != 1:
        raise SidecarError(
            f"the AV template in {str(path)!r} has {markers} markers for rows of {pool.least} to {pool.window} "
            "activations", "one, which prompts repeat", "build the table again with templates.positions=1",
        )  # fmt: skip
    if pool.least is None and markers != pool.window:
        raise SidecarError(
            f"the AV template in {str(path)!r} has {markers} markers for 'pool.window' = {pool.window} activations",
            "a marker for each", f"build the table again with templates.positions={pool.window}",
        )  # fmt: skip


def _at_least(path: Path, key: str, value: int, least: int) -> None:
    if value < least:
        raise SidecarError(f"{key!r} in {str(path)!r} is {value}", f"at least {least}", _REMEDY)


def _share_below_1(path: Path, key: str, value: float) -> None:
    if not 0 <= value < 1:
        raise SidecarError(f"{key!r} in {str(path)!r} is {value}", "0 or above, below 1", _REMEDY)


def _present(path: Path, values: Mapping[str, object]) -> None:
    for key, value in values.items():
        if value is None:
            raise SidecarError(f"no key {key!r} in {str(path)!r}", f"the keys {', '.join(values)}", _REMEDY)


def _templates_out(templates: PromptTemplates | None, av_key: str, ar_key: str) -> dict[str, str]:
    if templates is None:
        return {}
    literal = templates.av.replace("{", "{{").replace("}", "}}")
    named = {av_key: literal.replace(INJECT, _FIELD), ar_key: templates.ar}
    return {key: template for key, template in named.items() if template is not None}


def _templates_in(raw: object, path: Path) -> dict[str, Any] | None:
    """Our templates from the shared layout; None when the file has none, as a base table's."""
    if not raw:
        return None
    if not isinstance(raw, Mapping):
        raise SidecarError(f"'prompt_templates' in {str(path)!r} is {raw!r}", "a mapping", _REMEDY)
    unknown = [key for key in raw if key not in ("av", "ar", "actor", "critic")]
    if unknown:
        raise SidecarError(f"unknown key 'prompt_templates.{unknown[0]}' in {str(path)!r}", "av, ar", _REMEDY)
    av = raw.get("av") or raw.get("actor")
    try:
        shown = av.format(injection_char=INJECT) if isinstance(av, str) else ""
    except (KeyError, IndexError, ValueError):  # another field, a positional field, an unbalanced brace
        shown = ""
    if not shown.count(INJECT):
        raise SidecarError(
            f"the AV template under 'prompt_templates' in {str(path)!r} is {av!r}",
            f"a format string with {_FIELD} in it and every literal brace doubled",
            _REMEDY,
        )
    return {"av": shown, "ar": raw.get("ar") or raw.get("critic")}
