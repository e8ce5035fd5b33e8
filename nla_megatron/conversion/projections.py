"""An AV's learned projections in its Hugging Face directory, where its sidecar's injection has any.

They lie in a folder of their own: whoever loads every *.safetensors of a model, as vLLM does, takes them for weights.
Their tensors are called as in `interventions.projection`, behind the number of the block in the sidecar's list.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from nla_megatron.contract.sidecar import model_sidecar_path, read_model_sidecar
from nla_megatron.conversion.formats.weights import finite_tensors
from nla_megatron.conversion.hf import write_head
from nla_megatron.conversion.safetensors_file import read_header
from nla_megatron.errors import CheckpointError, MissingFile
from nla_megatron.interventions.projection import Projection
from nla_megatron.interventions.spec import Intervention
from nla_megatron.models.builder import chunks_of
from nla_megatron.models.projections import projection_of, projections_of

PROJECTION_FILE = Path("injection") / "projection.safetensors"


def check_projections(directory: str | Path, interventions: Sequence[Intervention], width: int) -> Path | None:
    """The file of an AV's projections, after a look at its header; None where they start afresh, or there are none.

    Args:
        interventions: of a table, in the order of its sidecar's blocks.
        width: hidden size.

    Raises:
        MissingFile: an AV without the projections that its sidecar names, which would be the identity in silence.
        CheckpointError: projections of another number, depth or width.
    """
    expected = _shapes(interventions, width)
    path = Path(directory) / PROJECTION_FILE
    if not expected:
        return None
    if not path.is_file():
        if _names_one(directory):
            raise MissingFile(
                f"no {PROJECTION_FILE} in {directory}", "the projections that the AV was trained with",
                "copy the folder along with the weights, or start from a base model",
            )  # fmt: skip
        return None
    found = {name: placed.spec.shape for name, placed in read_header(path).items()}
    if found != expected:
        names = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        told, wanted = ({name: one[name] for name in names if name in one} for one in (found, expected))
        raise CheckpointError(
            f"{told} in {path}", f"{wanted}, for the injection of the table",
            "use an AV and a table of the same build, or start from a base model",
        )  # fmt: skip
    return path


def read_projections(directory: str | Path, interventions: Sequence[Intervention], width: int) -> dict[int, Projection]:
    """An AV's projections by the number of their intervention, on the CPU; none where they start afresh.

    Raises:
        MissingFile, CheckpointError: as `check_projections`.
    """
    path = check_projections(directory, interventions, width)
    if path is None:
        return {}
    tensors, made = finite_tensors(path), _made(interventions, width)
    for number, projection in made.items():
        projection.load_state_dict({name: tensors[f"{number}.{name}"] for name in projection.state_dict()})
    return made


def load_projections(model: Any, directory: str) -> None:
    """Fill what this rank's chunks learn for `project` from an AV's directory; a base model's leaves them as they are.

    Raises:
        MissingFile, CheckpointError: as `check_projections`.
    """
    chunk, mine = chunks_of(model)[0], projections_of(model)
    wanted = () if chunk.sites is None else chunk.sites.interventions
    for number, projection in read_projections(directory, wanted, chunk.shape.hidden_size).items():
        if number in mine:
            mine[number].load_state_dict(projection.state_dict())


def write_projections(directory: Path, projections: Mapping[int, Projection]) -> None:
    """Write projections where `read_projections` finds them; none are no file."""
    if projections:
        (directory / PROJECTION_FILE).parent.mkdir(exist_ok=True)
        write_head(directory / PROJECTION_FILE, _tensors(projections))


def carry_projections(source: Path, target: Path) -> None:
    """Copy the file along with a model that is converted, where there is one."""
    if (source / PROJECTION_FILE).is_file():
        (target / PROJECTION_FILE).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / PROJECTION_FILE, target / PROJECTION_FILE)


def _made(interventions: Sequence[Intervention], width: int) -> dict[int, Projection]:
    return {
        number: projection_of(each, width, None) for number, each in enumerate(interventions) if each.mode == "project"
    }


def _tensors(projections: Mapping[int, Projection]) -> dict[str, Tensor]:
    return {f"{number}.{name}": each for number, one in projections.items() for name, each in one.state_dict().items()}


def _shapes(interventions: Sequence[Intervention], width: int) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in _tensors(_made(interventions, width)).items()}


def _names_one(directory: str | Path) -> bool:
    if not model_sidecar_path(directory).is_file():
        return False
    injection = read_model_sidecar(directory).injection
    return injection is not None and injection.projection is not None
