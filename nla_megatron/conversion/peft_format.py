"""Adapters as the `peft` library keeps them: `adapter_config.json` beside `adapter_model.safetensors`.

Only plain LoRA on linear layers passes. Whatever else a configuration asks for is refused by name: a key that is not
known here may change what an adapter means.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from nla_megatron.conversion.formats.companions import check_companions
from nla_megatron.conversion.hf import read_json
from nla_megatron.conversion.safetensors_file import read_header
from nla_megatron.errors import CheckpointError, MissingFile, UnsupportedModel
from nla_megatron.models.lora_spec import scale

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(r"^(?P<module>.+)\.lora_(?P<matrix>[AB])(\.default)?\.weight$")
# Keys without a say in what the weights mean: where the adapter came from, and which modules it has, which the file of
# weights says itself. `megatron_core` is only read with `megatron_config`.
_SILENT = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "megatron_core", "peft_version", "revision", "runtime_config", "target_modules", "task_type",
    "qalora_group_size",
}  # fmt: skip
_HONOURED = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout", "peft_type"}
# Other ways to start change the base's weights too, so that the pairs alone do not say what was trained.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", None)


@dataclass(frozen=True)
class PeftConfig:
    """What an adapter's configuration says of its pairs; modules are named as in the base model."""

    rank: int
    alpha: float
    rslora: bool = False
    dropout: float = 0.0
    base: str | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def rank_of(self, module: str) -> int:
        return _by_pattern(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float:
        return _by_pattern(self.alpha_pattern, module, self.alpha)

    def scale_of(self, module: str) -> float:
        return scale(self.rank_of(module), self.alpha_of(module), self.rslora)

    def as_json(self, targets: tuple[str, ...]) -> dict[str, Any]:
        """What `peft` reads; `targets` are names of projections."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "use_rslora": self.rslora,
            "lora_dropout": self.dropout,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "target_modules": list(targets),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        }


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The first pattern that matches the end of a module's name, as `peft` decides it."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def read_peft_config(directory: str | Path) -> PeftConfig:
    """The configuration of a plain LoRA adapter.

    Raises:
        MissingFile: no adapter_config.json there.
        UnsupportedModel: another method than LoRA, or a feature that would not be honoured, by its key.
    """
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise MissingFile(f"no {path}", "the directory of a peft adapter", "give the directory that peft saved")
    check_companions(Path(directory))
    raw = read_json(path)
    refused = {
        key: value for key, value in raw.items() if key not in _SILENT | _HONOURED and _says_something(key, value)
    }
    if raw.get("peft_type") != "LORA":
        refused = {"peft_type": raw.get("peft_type")}
    if refused:
        key, value = next(iter(refused.items()))
        raise UnsupportedModel(
            f"{key}={value!r} in {path}",
            "plain LoRA on linear layers",
            "merge the adapter with peft and convert the merged model",
        )
    return PeftConfig(
        rank=raw.get("r", 8),
        alpha=raw.get("lora_alpha", 8),
        rslora=bool(raw.get("use_rslora", False)),
        dropout=raw.get("lora_dropout") or 0.0,
        base=raw.get("base_model_name_or_path"),
        rank_pattern=raw.get("rank_pattern") or {},
        alpha_pattern=raw.get("alpha_pattern") or {},
    )


def _says_something(key: str, value: Any) -> bool:
    if key == "bias":
        return value != "none"
    if key == "init_lora_weights":
        return value not in _PLAIN_STARTS
    return bool(value)


class AdapterReader:
    """The pairs of an adapter's file, by module of the base model.

    Args:
        path: a safetensors file.
        prefix: what stands before the base model's own names.
        beside: other tensors that may be in it; see `beside`.

    Raises:
        MissingFile: no such file.
        CheckpointError: a damaged file.
        UnsupportedModel: a tensor that is no A or B of a linear layer.
        CheckpointError: an A without its B, or the reverse.
    """

    def __init__(self, path: Path, prefix: str = _PREFIX, beside: tuple[str, ...] = ()):
        from safetensors import safe_open

        if not path.is_file():
            raise MissingFile(f"no {path}", "the weights of an adapter", "save the adapter as safetensors")
        self.path = path
        read_header(path)  # a damaged file is refused here
        self._file = safe_open(path, "pt")
        self._keys: dict[str, dict[str, str]] = {}
        for key in self._file.keys():
            match = _KEY.match(key)
            if match and key.startswith(prefix):
                self._keys.setdefault(match["module"].removeprefix(prefix), {})[match["matrix"]] = key
            elif key not in beside:
                raise UnsupportedModel(
                    f"tensor {key!r} in {path}", "A and B of linear layers only", "merge the adapter with peft"
                )
        for module, keys in self._keys.items():
            if len(keys) != 2:
                raise CheckpointError(f"only lora_{next(iter(keys))} of {module} in {path}", "A and B", "save it again")

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(self._keys)

    def shape(self, module: str, matrix: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(self._keys[module][matrix]).get_shape())

    def slice(self, module: str, matrix: str, axis: int, start: int, stop: int) -> Tensor:
        """Rows (axis 0) or columns (axis 1) of A (R, inputs) or B (outputs, R)."""
        window = self._file.get_slice(self._keys[module][matrix])
        return window[start:stop] if axis == 0 else window[:, start:stop]

    def whole(self, module: str, matrix: str) -> Tensor:
        return self._file.get_tensor(self._keys[module][matrix])

    def beside(self, key: str) -> Tensor:
        """A tensor that is no adapter's. Raises CheckpointError where it is missing."""
        if key not in self._file.keys():
            raise CheckpointError(f"no {key} in {self.path}", "a complete file", "copy or save it again")
        return self._file.get_tensor(key)

    def check(self, module: str, rank: int, weight: tuple[int, ...]) -> None:
        """Raises CheckpointError where a pair is not (rank, inputs) and (outputs, rank) of a weight's shape."""
        found = (self.shape(module, "A"), self.shape(module, "B"))
        expected = ((rank, weight[-1]), (weight[0], rank))
        if len(weight) != 2 or found != expected:
            raise CheckpointError(
                f"A and B of shapes {found[0]} and {found[1]} for {module} in {self.path}",
                f"{expected[0]} and {expected[1]}: rank {rank} on a weight of shape {weight}",
                "use the base model that the adapter was trained on",
            )
