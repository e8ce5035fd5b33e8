"""How vLLM reads a model directory: by the rule of every other command, see `conversion.formats`.

On its own it would follow an index that lies beside a newer `model.safetensors`, and take every *.safetensors for
weights.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from torch import Tensor
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from nla_megatron.conversion.formats.weights import COMPUTED, INDEX, SafetensorsReader, check_finite, weight_files

FORMAT = "nla_megatron"
"""Our name among vLLM's `load_format`."""


@register_model_loader(FORMAT)
class ModelDirectoryLoader(DefaultModelLoader):
    """The weights that count, in vLLM's own order and by its own means."""

    def _prepare_weights(
        self, model_name_or_path: str, *args: Any, **kwargs: Any
    ) -> tuple[str, list[str], bool, str]:  # fmt: skip
        return model_name_or_path, [str(path) for path in weight_files(model_name_or_path)[0]], True, INDEX

    def _get_weights_iterator(self, source: DefaultModelLoader.Source) -> Generator[tuple[str, Tensor], None, None]:
        renamed = SafetensorsReader(source.model_or_path).renamed
        for name, tensor in super()._get_weights_iterator(source):
            if not COMPUTED.fullmatch(name):
                check_finite(tensor, name, source.model_or_path)
                yield renamed.get(name, name), tensor
