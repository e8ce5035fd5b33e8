"""`conversion.json`: what a conversion wrote, from what, with which versions; one checksum per Hugging Face tensor.

The checksum is of the tensor's bytes as they are written, so that import and export of one tensor agree.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from nla_megatron.contract.files import git_commit, write_json
from nla_megatron.conversion.hf import MANIFEST
from nla_megatron.conversion.safetensors_file import CHECKSUM, TensorSpec

_SNAPSHOT = re.compile(r"/snapshots/([0-9a-f]{40})$")


@dataclass(frozen=True)
class Record:
    """A tensor as it was written: `file` holds it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    checksum: str
    file: str

    @classmethod
    def of(cls, spec: TensorSpec, checksum: str, file: str) -> Record:
        return cls(spec.name, dtype_name(spec.dtype), spec.shape, checksum, file)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def identity_of(directory: Path) -> dict[str, str]:
    """Where a model came from, as far as its directory tells: path, hub commit, name in its configuration."""
    found = {"directory": str(directory.resolve())}
    if snapshot := _SNAPSHOT.search(found["directory"]):
        found["commit"] = snapshot[1]
    # `huggingface-cli download --local-dir` notes the commit as the first line of a file's record.
    for note in sorted((directory / ".cache" / "huggingface" / "download").glob("config.json.metadata")):
        found["commit"] = note.read_text().split("\n", 1)[0]
    config = directory / "config.json"
    if config.is_file() and (name := json.loads(config.read_text()).get("_name_or_path")):
        found["name"] = name
    before = read_manifest(directory)
    return found if before is None else {**found, "converted_from": before["source"].get("directory", "")}


def write_manifest(directory: Path, source: Path, options: dict[str, Any], records: Iterable[Record]) -> None:
    write_json(
        directory / MANIFEST,
        {
            "kind": "nla_conversion",
            "schema_version": 1,
            "options": options,
            "source": identity_of(source),
            "versions": {
                "nla_megatron": _version("nla_megatron"), "nla_megatron_commit": git_commit(),
                "torch": torch.__version__, "megatron-core": _version("megatron-core"),
                "transformers": _version("transformers"),
            },
            "checksum": CHECKSUM,
            "tensors": {record.name: _without_name(record) for record in sorted(records, key=lambda one: one.name)},
        },
    )  # fmt: skip


def _without_name(record: Record) -> dict[str, Any]:
    return {key: value for key, value in asdict(record).items() if key != "name"}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout
        return ""


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a directory that a conversion wrote; None in any other."""
    path = directory / MANIFEST
    return json.loads(path.read_text()) if path.is_file() else None
