"""config.json of a model directory as every command reads it."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from nla_megatron.conversion.formats.companions import check_companions
from nla_megatron.conversion.formats.config_keys import QUANTIZATION, takes_null, without_empty
from nla_megatron.conversion.formats.json_file import read_json
from nla_megatron.conversion.formats.notes import say_once
from nla_megatron.conversion.formats.weights import holds_floats_alone
from nla_megatron.errors import MissingFile

CONFIG = "config.json"


def read_config(directory: str | Path) -> dict[str, Any]:
    """config.json of a Hugging Face directory: the entries that say something.

    Nulls are absent, where they do not switch something off. So are notes of a quantisation where the weights beside
    them are in floating point: the model was dequantised, and kept them.

    Raises:
        MissingFile: there is none, or another file beside the weights is there by name alone.
        CheckpointError: it is damaged.
    """
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise MissingFile(
            f"no {path}", "a Hugging Face model directory", "give the path of a directory with config.json"
        )
    check_companions(Path(directory))
    config = without_empty(read_json(path))
    notes = [key for key, value in config.items() if QUANTIZATION.fullmatch(key) and value]
    if notes and holds_floats_alone(Path(directory)):
        say_once(f"{path} has {', '.join(notes)}, and weights in floating point: read as a model that is not quantised")
        return {key: value for key, value in config.items() if key not in notes}
    return config


def settled_directory(directory: str | Path) -> Path:
    """Where other libraries find the model with config.json as `read_config` reads it.

    That is the directory itself, unless its config.json says what would lead them astray: notes of a quantisation, or
    nulls that they refuse. Then it is one of this process's own, with links to the other files.

    Raises:
        MissingFile, CheckpointError: as `read_config`.
    """
    config, raw = read_config(directory), read_json(Path(directory) / CONFIG)
    changed = [key for key in raw if key not in config or config[key] != raw[key]]
    if all(raw[key] is None and takes_null(str(raw.get("model_type")), key) for key in changed):
        return Path(directory)
    return _linked(Path(directory).resolve(), json.dumps(config, indent=2))


@cache
def _linked(directory: Path, config: str) -> Path:
    made = Path(tempfile.mkdtemp(prefix="nla_megatron_"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    for path in directory.iterdir():
        if path.is_file() and path.name != CONFIG:
            (made / path.name).symlink_to(path)
    (made / CONFIG).write_text(config + "\n")
    return made
