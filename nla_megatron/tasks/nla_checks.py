"""Whether a table, its sidecar and the models trained on it belong together."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from nla_megatron.contract.markers import INJECT
from nla_megatron.contract.sidecar import DatasetSidecar, InjectionSpec, ModelSidecar, PoolSpec
from nla_megatron.contract.tables import Table
from nla_megatron.errors import ColumnError, MarkerError, SidecarError, WidthError
from nla_megatron.interventions.spec import TOKEN_EMBEDDING

MSE_SCALE = "sqrt_d_model"


def check_table(table: Table, sidecar: DatasetSidecar) -> None:
    """Raises WidthError or SidecarError where a table is not the one its sidecar was written for."""
    if table.d_model != sidecar.extraction.d_model:
        raise WidthError(
            f"vectors of width {table.d_model} in {table.path}",
            f"{sidecar.extraction.d_model}, as its sidecar says",
            "put table and sidecar of the same build together",
        )
    if table.n_rows != sidecar.row_count:
        raise SidecarError(
            f"{table.n_rows} rows in {table.path}",
            f"{sidecar.row_count}, as its sidecar says",
            "put table and sidecar of the same build together",
        )
    check_stack(table, sidecar.pool)


def check_stack(table: Table, pool: PoolSpec | None) -> None:
    """Raises SidecarError where rows keep other numbers of activations than the sidecar's `pool` says, and ColumnError
    where there are no rows.
    """
    if not table.n_rows:
        raise ColumnError(f"no rows in {table.path}", "a table with rows", "give another table, or write it again")
    bounds, remedy = PoolSpec.bounds_of(pool), "put table and sidecar of the same build together"
    if bounds is None:
        wanted = PoolSpec.positions_of(pool)
        if table.varies or table.positions != wanted:
            number = "any number of" if table.varies else table.positions
            found = f"{number} activations in each row of {table.path}"
            raise SidecarError(found, f"{wanted}, as its sidecar says", remedy)
        return
    if not table.varies:
        found = f"{table.positions} activations in each row of {table.path}"
        raise SidecarError(found, f"lists of {bounds[0]} to {bounds[1]}, as its sidecar says", remedy)
    outside = np.flatnonzero((table.activations < bounds[0]) | (table.activations > bounds[1]))
    if outside.size:
        found = f"{table.activations[outside[0]]} activations in row {outside[0]} of {table.path}"
        raise SidecarError(found, f"{bounds[0]} to {bounds[1]}, as its sidecar says", remedy)


def check_markers(table: Table) -> None:
    """Raises MarkerError where a stored prompt has not one marker for each of its row's activations."""
    markers = table.markers()
    wrong = np.flatnonzero(markers != table.activations)
    if wrong.size:
        row = wrong[0]
        raise MarkerError(
            f"{markers[row]} times {INJECT} in the prompt of row {row} of {table.path}, which keeps "
            f"{table.activations[row]} activations", "once for each", "build the table again",
        )  # fmt: skip


def check_blocks(sidecar: DatasetSidecar, injection: InjectionSpec, data: str, model: str, num_layers: int) -> None:
    """Raises SidecarError where a table speaks of blocks that its model lacks."""
    places = [("extraction.layer_index", sidecar.extraction.layer_index, 0)]
    key = "injection.layer" if injection.layers is None else "injection.layers"
    for name, block, least in (*((key, block, TOKEN_EMBEDDING) for block in injection.blocks), *places):
        if not least <= block < num_layers:
            raise SidecarError(
                f"{name} = {block} in the sidecar of {data}",
                f"a block of {model}, {least} to {num_layers - 1}",
                "use the model the table was made with",
            )


def differing(found: Any, expected: Any) -> tuple[str, str]:
    """Two values for a message; of two of one dataclass only the fields in which they differ."""
    if not is_dataclass(found) or type(found) is not type(expected):
        return str(found), str(expected)
    names = [each.name for each in fields(found) if getattr(found, each.name) != getattr(expected, each.name)]
    first, second = (", ".join(f"{name}={getattr(one, name)!r:.100}" for name in names) for one in (found, expected))
    return first, second


def scale_name(model: ModelSidecar) -> float | str | None:
    """The scale of a model's errors; its number, the square root of the width, is the contract's name for it."""
    scale = model.extraction.mse_scale
    # Some write it with two decimals.
    is_root = isinstance(scale, float | int) and math.isclose(scale, math.sqrt(model.d_model), rel_tol=1e-3)
    return MSE_SCALE if is_root else scale
