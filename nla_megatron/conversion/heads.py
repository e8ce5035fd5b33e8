"""An AR's own tensors in a Hugging Face directory, and whether they are those that its sidecar speaks of.

A plain AR (a matrix on the last token's stream behind block K) has its matrix where every trainer looks for it,
`value_head.safetensors` with the key `weight`. Any other has `reconstructor_head.safetensors` instead, so that a
trainer that knows the plain one alone finds no head and refuses it, in place of reading it wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from nla_megatron.contract.blocks import ReconstructorSpec
from nla_megatron.contract.sidecar import ModelSidecar, model_sidecar_path, read_model_sidecar
from nla_megatron.conversion.formats.weights import finite_tensors
from nla_megatron.conversion.hf import HEAD_FILE, VALUE_HEAD, read_shape, write_head
from nla_megatron.conversion.safetensors_file import read_header
from nla_megatron.errors import CheckpointError, ConfigError, MissingFile, SidecarError
from nla_megatron.models.heads import head_shapes
from nla_megatron.types import ModelShape

_FILES = (VALUE_HEAD, HEAD_FILE)
_REMEDY = "put the sidecar and the weights of one AR together, or export it again"


def is_reconstructor(directory: str | Path) -> bool:
    """Whether a directory is an AR's: by its sidecar, or by its head where it has none."""
    sidecar = _sidecar(directory)
    return sidecar.role == "ar" if sidecar is not None else any((Path(directory) / name).is_file() for name in _FILES)


def _sidecar(directory: str | Path) -> ModelSidecar | None:
    return read_model_sidecar(directory) if model_sidecar_path(directory).is_file() else None


def resolved_spec(
    directory: str | Path, wanted: ReconstructorSpec | None = None, layer_index: int | None = None
) -> ReconstructorSpec:
    """How the AR that starts from this directory reads.

    Args:
        directory: a base model's, which starts any AR; or an AR's, which has its own way, from which only the dropout
            may differ.
        wanted: as configured; None is what the directory's sidecar says, and the plain AR for a base model.
        layer_index: K, in the place of a layer that is None.

    Raises:
        SidecarError: an AR that reads otherwise than `wanted`.
    """

    def placed(spec: ReconstructorSpec) -> ReconstructorSpec:
        return replace(spec, layer=layer_index) if spec.layer is None else spec

    if not is_reconstructor(directory):
        return placed(wanted or ReconstructorSpec())
    sidecar = _sidecar(directory)
    recorded = placed((sidecar and sidecar.reconstructor) or ReconstructorSpec())
    if wanted is None:
        return recorded
    if not placed(wanted).same_parameters(recorded):
        raise SidecarError(
            f"reconstructor {placed(wanted)} for the AR in {directory}", f"{recorded}, as its sidecar says",
            "set reconstructor to what the AR has, or start from a base model",
        )  # fmt: skip
    return placed(wanted)


def reconstructor_shape(directory: str | Path, spec: ReconstructorSpec) -> ModelShape:
    """The blocks that are kept, after a check of what an AR's directory holds.

    Args:
        spec: from `resolved_spec`, with its layer.

    Raises:
        ConfigError: a base model has no such block.
        SidecarError: an AR of another depth than its sidecar says.
        MissingFile, CheckpointError: as `head_of`.
    """
    shape, layer = read_shape(directory), spec.layer
    assert layer is not None
    if is_reconstructor(directory):
        sidecar = _sidecar(directory)
        told = sidecar is not None and sidecar.reconstructor is not None
        if layer >= shape.num_layers or (told and layer + 1 != shape.num_layers):
            raise SidecarError(
                f"an AR of {shape.num_layers} blocks in {directory}, whose sidecar has it read behind block {layer}",
                f"{layer + 1} blocks", _REMEDY,
            )  # fmt: skip
    elif layer >= shape.num_layers:
        raise ConfigError(
            f"reconstructor.layer={layer} for {directory}", f"a block of it, 0 to {shape.num_layers - 1}",
            "set reconstructor.layer",
        )  # fmt: skip
    kept = shape.truncated(layer + 1)
    check_head(directory, kept, spec)
    return kept


def check_head(
    directory: str | Path, shape: ModelShape, spec: ReconstructorSpec, role: str | None = None
) -> Path | None:
    """The file of an AR's head, after a look at its header; None in a directory that is no AR's.

    Args:
        role: what the directory is; None asks its sidecar, where it has one.

    Raises:
        MissingFile: an AR without its head, which would be the identity in silence.
        CheckpointError: a file of other tensors than `spec` has, or both files.
    """
    there = [Path(directory) / name for name in _FILES if (Path(directory) / name).is_file()]
    if not there:
        if role == "ar" or (role is None and is_reconstructor(directory)):
            raise MissingFile(
                f"no {VALUE_HEAD} or {HEAD_FILE} in {directory}", "the head of a trained AR",
                "copy it along with the weights",
            )  # fmt: skip
        return None
    sidecar = _sidecar(directory)
    # Without a sidecar an AR is another trainer's, whose head reads its last block.
    layer_index = spec.layer if sidecar is None else sidecar.extraction.layer_index
    expected, plain = head_shapes(shape, spec), spec.is_plain(layer_index)
    found = {name: placed.spec.shape for name, placed in read_header(there[0]).items()}
    if found != expected or len(there) > 1 or (there[0].name == VALUE_HEAD) != plain:
        raise CheckpointError(
            f"{found} in {', '.join(path.name for path in there)} of {directory}",
            f"{expected} in {_file_name(plain)}, for {spec}",
            _REMEDY,
        )
    return there[0]


def head_of(
    directory: str | Path, shape: ModelShape, spec: ReconstructorSpec, role: str | None = None
) -> dict[str, Tensor] | None:
    """The tensors of an AR's head by their names in `models.heads`; None in a directory that is no AR's.

    Raises:
        MissingFile, CheckpointError: as `check_head`.
    """
    path = check_head(directory, shape, spec, role)
    return None if path is None else finite_tensors(path)


def write_reconstructor_head(
    directory: Path, tensors: Mapping[str, Tensor], spec: ReconstructorSpec, layer_index: int | None
) -> None:
    """Write a head where `head_of` finds it; `layer_index` is K."""
    write_head(directory / _file_name(spec.is_plain(layer_index)), tensors)


def _file_name(plain: bool) -> str:
    return VALUE_HEAD if plain else HEAD_FILE
