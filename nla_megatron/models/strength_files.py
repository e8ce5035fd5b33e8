"""A strength predictor on disk: `predictor.safetensors`, and in `predictor.json` its form and what it steers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nla_megatron.contract.files import atomic_path
from nla_megatron.errors import CheckpointError, ConfigError, MissingFile
from nla_megatron.interventions.spec import Intervention
from nla_megatron.models.strength import PredictorConfig, StrengthPredictor

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS, DESCRIPTION = "predictor.safetensors", "predictor.json"
STEPS_PER_EPOCH = "steps_per_epoch"
"""Of `Description.training`: steps in which a run passes over its rows once."""
_FORMAT = 1
_AGAIN = "export the predictor again"


@dataclass(frozen=True)
class Description:
    """A predictor's form: `strengths` of features `width` wide, for `interventions` on `base_model`.

    `training`: what its run tells of itself, among it `steps`, and `steps_per_epoch` where it was rewarded.
    """

    width: int
    strengths: int
    config: PredictorConfig
    interventions: tuple[Intervention, ...]
    base_model: str
    training: Mapping[str, Any]


def write_predictor(
    directory: Path | str, predictor: StrengthPredictor, interventions: Sequence[Intervention], base_model: str,
    training: Mapping[str, Any],
) -> None:  # fmt: skip
    """Both files, each whole or not at all; the description last, without which there is no predictor."""
    from safetensors.torch import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: values.detach().cpu().contiguous() for name, values in predictor.state_dict().items()}
    described = {
        "format": _FORMAT,
        "features": "mean over the prompt's tokens of the states behind the final norm, unsteered",
        "width": predictor.width,
        "strengths": predictor.strengths,
        "predictor": asdict(predictor.config),
        "interventions": [each.to_dict() for each in interventions],
        "base_model": base_model,
        "training": dict(training),
    }
    with atomic_path(directory / WEIGHTS) as path:
        save_file(weights, path)
    with atomic_path(directory / DESCRIPTION) as path:
        path.write_text(json.dumps(described, indent=2) + "\n")


def read_description(directory: Path | str) -> Description:
    """Raises MissingFile or CheckpointError where `predictor.json` is not there or not one of ours."""
    path = Path(directory) / DESCRIPTION
    if not path.is_file():
        raise MissingFile(f"no {path}", f"a directory with {DESCRIPTION} and {WEIGHTS}", "correct predictor.path")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != _FORMAT:
            raise CheckpointError(f"format {values['format']} of {path}", f"{_FORMAT}", "use the version that wrote it")
        return Description(
            int(values["width"]),
            int(values["strengths"]),
            PredictorConfig(**values["predictor"]),
            tuple(Intervention.from_dict(each) for each in values["interventions"]),
            str(values["base_model"]),
            dict(values["training"]),
        )
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{path}: {error!r}", "what an export writes", _AGAIN) from error


def read_weights(directory: Path | str) -> dict[str, Tensor]:
    """Of `StrengthPredictor.load_state_dict`.

    Raises:
        MissingFile, CheckpointError: no such file, one that is damaged, or other tensors than the description's.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path, described = Path(directory) / WEIGHTS, read_description(directory)
    if not path.is_file():
        raise MissingFile(f"no {path}", f"the weights of {DESCRIPTION}", _AGAIN)
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: {error}", "a safetensors file", _AGAIN) from error
    wanted = StrengthPredictor(described.width, described.strengths, described.config).state_dict()
    found = {name: tuple(values.shape) for name, values in weights.items()}
    expected = {name: tuple(values.shape) for name, values in wanted.items()}
    if found != expected:
        raise CheckpointError(f"tensors {found} in {path}", f"{expected}", _AGAIN)
    if broken := [name for name, values in weights.items() if not values.isfinite().all()]:
        raise CheckpointError(f"{broken[0]} of {path}, which is not finite", "finite weights", _AGAIN)
    return weights


def read_predictor(directory: Path | str) -> tuple[StrengthPredictor, Description]:
    """An exported predictor, in evaluation mode; errors as of `read_weights`."""
    described = read_description(directory)
    predictor = StrengthPredictor(described.width, described.strengths, described.config)
    predictor.load_state_dict(read_weights(directory))
    return predictor.eval(), described
