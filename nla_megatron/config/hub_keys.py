"""Which keys of each command may hold a name of the hub, and a configuration with paths in their place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nla_megatron.hub import dataset_path, model_directory

MODEL, DATA, SHAPE = "model", "data", "shape"
_OF_TRAINED = {"av": MODEL, "ar": MODEL, "model": MODEL, "data": DATA, "held_out": DATA}
HUB_KEYS: dict[str, dict[str, str]] = {
    "pretrain": {"corpus": DATA, "tokenizer": MODEL},
    "extract": {"model": MODEL, "corpus": DATA},
    "explain": {"input": DATA},
    "build": {"input": DATA, "model": MODEL},
    "sft": {"model": MODEL, "ar_model": MODEL, "data": DATA, "ar_data": DATA},
    "rl": _OF_TRAINED,
    "eval": {**{key: kind for key, kind in _OF_TRAINED.items() if key != "held_out"}, "frozen_ar": MODEL},
    "demo": {"model": MODEL},
    "convert": {"hf": MODEL, "checkpoint": MODEL},
    "plan": {"hf": SHAPE},
    "merge": {"base": MODEL, "adapter": MODEL},
    "adopt": {"checkpoint": MODEL, "base": MODEL, "sidecar": MODEL},
}
"""By command: a whole model, a table or a corpus, a model of which only the configuration is read."""


def with_paths(command: str, config: Any) -> Any:
    """The configuration, with the path in the hub's cache where a key holds a name. Raises MissingFile, ConfigError."""
    changed = {}
    for key, kind in HUB_KEYS.get(command, {}).items():
        value = getattr(config, key)
        if isinstance(value, str) and (path := _path(value, key, kind, config)) != value:
            changed[key] = path
    return replace(config, **changed) if changed else config


def _path(value: str, key: str, kind: str, config: Any) -> str:
    if kind == DATA:
        return dataset_path(value, key)
    sketch = kind == SHAPE or getattr(config, "dry_run", False)
    return model_directory(value, key, ("*.json",) if sketch else None)
