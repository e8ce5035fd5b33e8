"""What FVE compares with: the mean of the training rows, in a file beside each table whose checksum its sidecar has.

Thousands of numbers would bury the rest of a sidecar, which people read. A sidecar without `baseline` is another
trainer's, or was written before there was one.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING

from nla_megatron.contract.blocks import BaselineSpec
from nla_megatron.contract.files import atomic_path
from nla_megatron.errors import MissingFile, SidecarError
from nla_megatron.reading import read_bytes

if TYPE_CHECKING:
    import numpy as np


def baseline_path(parquet: Path | str) -> Path:
    """Where the mean that goes with a table stands: an array of NumPy's, (d,) float32."""
    return Path(f"{parquet}.mean.npy")


def write_baseline(parquet: Path | str, mean_D: np.ndarray, rows: int, scale: float | str | None) -> BaselineSpec:
    """Write the mean of `rows` training rows, each at `scale`, beside a table; returns what its sidecar says of it."""
    import numpy as np

    content = io.BytesIO()
    np.save(content, np.asarray(mean_D, dtype="<f4"), allow_pickle=False)
    with atomic_path(baseline_path(parquet)) as temporary:
        temporary.write_bytes(content.getvalue())
    return BaselineSpec(rows, scale, hashlib.sha256(content.getvalue()).hexdigest())


def read_baseline(parquet: Path | str, spec: BaselineSpec, d_model: int) -> np.ndarray:
    """The mean (d,) that a table's sidecar names.

    Raises:
        MissingFile: the file is not beside the table.
        SidecarError: it is not the one that the sidecar was written with, or of another width.
    """
    import numpy as np

    path = baseline_path(parquet)
    remedy = "copy it along with its table and sidecar, or build the table again"
    if not path.is_file():
        raise MissingFile(f"no file at {str(path)!r}", "the mean that FVE compares with", remedy)
    content = read_bytes(path)
    found, told = hashlib.sha256(content).hexdigest(), spec.sha256
    if found != told:
        raise SidecarError(f"checksum {found[:12]}... of {str(path)!r}", f"{told[:12]}..., as its sidecar says", remedy)
    mean_D: np.ndarray = np.load(io.BytesIO(content), allow_pickle=False)
    if mean_D.shape != (d_model,):
        raise SidecarError(f"a mean of shape {mean_D.shape} in {str(path)!r}", f"({d_model},), as its table", remedy)
    return mean_D
