"""What is checked before anything is generated or trained: models, vectors, markers.

Legend: N requests, K vectors each, D wide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nla_megatron.errors import ConfigError, InjectionError, WidthError
from nla_megatron.interventions.placement import taken
from nla_megatron.interventions.spec import Intervention

_DATA = "check the table that the request was made from"


@dataclass(frozen=True)
class Marker:
    """The token at which vectors enter, and the ids on either side of it; a neighbour of None is not looked at."""

    token_id: int
    left_id: int | None = None
    right_id: int | None = None


def check_layers(interventions: Sequence[Intervention], num_layers: int) -> None:
    """Every intervention is at a place that the model has.

    Raises:
        ConfigError: a block beyond the last one.
    """
    for intervention in interventions:
        layer = intervention.layer
        if isinstance(layer, int) and layer >= num_layers:
            raise ConfigError(
                f"an intervention ({intervention.mode}) at block {layer} of a model with {num_layers} blocks",
                f"0 to {num_layers - 1}, or 'embedding'", "set another layer",
            )  # fmt: skip


def check_vectors(
    intervention: Intervention, vectors: np.ndarray, hidden_size: int, names: Sequence[object] = ()
) -> None:
    """Every vector can be injected.

    Args:
        vectors: raw activations (N, D), or (N, K, D) where requests bring several; for `project`, before the
            projection.
        names: of the requests, for messages; their numbers by default.

    Raises:
        WidthError: another width than the intervention takes, or another number of vectors per request.
        InjectionError: NaN, inf, or a norm of zero in fp32.
    """
    width, count = intervention.vector_width or hidden_size, intervention.vectors
    several = (count,) if count > 1 else ()
    used = taken(vectors, count)
    if used.shape != (len(names or vectors), *several, width):
        raise WidthError(
            f"vectors of shape {tuple(vectors.shape)} for {intervention.mode} at {intervention.place}",
            f"({', '.join(str(each) for each in ('requests', *several, width))})",
            "use activations of this model, or mode=project with their vector_width",
        )  # fmt: skip
    # Overflow and NaN are what is looked for here.
    with np.errstate(all="ignore"):
        norms = np.sqrt(np.square(used, dtype=np.float32).sum(axis=-1, dtype=np.float32)).reshape(-1)
    wrong = np.flatnonzero(~np.isfinite(norms) | (norms == 0))
    if len(wrong):
        first = int(wrong[0]) * len(vectors) // len(norms)
        name = names[first] if names else first
        raise InjectionError(
            f"{len(wrong)} of {len(norms)} vectors cannot be injected; the first, of request {name}, has norm "
            f"{norms[wrong[0]]}", "finite vectors with a direction", _DATA,
        )  # fmt: skip


def check_positions(
    intervention: Intervention,
    prompt_ids: Sequence[int],
    positions: Sequence[int],
    marker: Marker | None = None,
    name: object = "",
) -> None:
    """A request's positions are where its vector belongs.

    Args:
        positions: absolute indices in the prompt; empty unless the intervention is at "positions".
        marker: what must stand at each position; None where any token may.
        name: of the request, for messages.

    Raises:
        InjectionError: no position, or one given twice or not asked for, not one for each of several vectors (more or
            fewer than a row may bring), a position outside the prompt, a token that is not the marker, or another
            neighbour than the marker's.
    """
    request = f"request {name}" if name != "" else "a request"
    if bool(positions) != (intervention.where == "positions") or len(set(positions)) != len(positions):
        raise InjectionError(
            f"{request} names positions {list(positions)} for an intervention at {intervention.where!r}",
            "different positions where it is at 'positions', none elsewhere", _DATA,
        )  # fmt: skip
    if intervention.vectors > 1 and not intervention.takes(len(positions)):
        raise InjectionError(
            f"{request} names positions {list(positions)} for {intervention.counts} vectors",
            "a position for each vector", _DATA,
        )  # fmt: skip
    for position in positions:
        if not 0 <= position < len(prompt_ids):
            raise InjectionError(
                f"position {position} of {request}, whose prompt has {len(prompt_ids)} tokens",
                f"0 to {len(prompt_ids) - 1}", _DATA,
            )  # fmt: skip
        if marker is not None:
            _check_marker(prompt_ids, position, marker, request)


def check_brought(intervention: Intervention, positions: int, brought: int, name: object) -> None:
    """Where rows may bring different numbers of vectors, each of a row's has a position.

    Args:
        positions, brought: how many positions a request or row names, and how many vectors it brings (`filled`).
        name: of the request or row, for messages.

    Raises:
        InjectionError: another number of the one than of the other, or than the intervention takes.
    """
    if intervention.fewest is not None and not (intervention.takes(positions) and positions == brought):
        raise InjectionError(
            f"{positions} positions of {name}, which brings {brought} activations",
            f"a position for each of {intervention.counts} activations", _DATA,
        )  # fmt: skip


def _check_marker(prompt_ids: Sequence[int], position: int, marker: Marker, request: str) -> None:
    wanted = {0: marker.token_id, -1: marker.left_id, 1: marker.right_id}
    for offset, token_id in wanted.items():
        index = position + offset
        found = prompt_ids[index] if 0 <= index < len(prompt_ids) else None
        if token_id is not None and found != token_id:
            part = {-1: "left of the marker", 0: "at the marker's position", 1: "right of the marker"}[offset]
            raise InjectionError(
                f"token {found} {part} ({position}) in {request}", f"token {token_id}",
                "use the tokenizer and the prompt that the sidecar records",
            )  # fmt: skip
