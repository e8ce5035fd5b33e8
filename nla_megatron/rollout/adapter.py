"""A LoRA policy as an adapter of vLLM's, handed over in memory: the base model's weights stay as they are.

vLLM reads adapters from directories. Its manager's class is swapped for one that reads what it was handed, so whatever
makes vLLM load the adapter again (other base weights, say) finds it too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nla_megatron.conversion.peft_format import PeftConfig
from nla_megatron.errors import CheckpointError, ConfigError, UnsupportedModel
from nla_megatron.models.lora_spec import PROJECTIONS

NUMBER = 1
"""The adapter's number in vLLM; there is one at a time."""

USUAL_RANK = 16
"""The largest that an engine takes where nobody says more."""
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<matrix>[AB])(\.default)?\.weight$")


@dataclass(frozen=True)
class Adapter:
    """Pairs by `peft`'s names, (R, inputs) and (outputs, R), and what they are multiplied by."""

    tensors: Mapping[str, Tensor]
    config: PeftConfig

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, Tensor]], config: PeftConfig, largest: int) -> Adapter:
        """A copy of the tensors: vLLM multiplies them in place, and the trainer goes on with its own.

        Raises:
            ConfigError: a rank above `largest`.
            UnsupportedModel: a tensor that is no A or B of a linear layer.
            CheckpointError: an A without its B, or of another rank than the configuration says.
        """
        copied = {name: tensor.detach().clone() for name, tensor in tensors}
        pairs: dict[str, dict[str, Tensor]] = {}
        for name, tensor in copied.items():
            match = _KEY.match(name)
            if match is None:
                raise UnsupportedModel(f"tensor {name!r} of an adapter", "A and B of linear layers", "merge it")
            pairs.setdefault(match["module"], {})[match["matrix"]] = tensor
        for module, pair in pairs.items():
            rank = config.rank_of(module)
            found = {matrix: tuple(tensor.shape)[0 if matrix == "A" else 1] for matrix, tensor in pair.items()}
            if found != {"A": rank, "B": rank}:
                raise CheckpointError(f"matrices of ranks {found} for {module}", f"A and B of rank {rank}", "export it")
            if rank > largest:
                raise ConfigError(
                    f"an adapter of rank {rank} for {module}", f"at most rollout.lora_rank={largest}",
                    "raise rollout.lora_rank",
                )  # fmt: skip
        return cls(copied, config)


def options(lora_rank: int) -> dict[str, Any]:
    """What vLLM is started with to take an adapter of rank `lora_rank` or less."""
    fitting = next(rank for rank in _RANKS if rank >= lora_rank)
    # Not the output layer: vLLM adapts its logits as those of sampled tokens, and cannot score a prompt then.
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": fitting, "lora_target_modules": [*PROJECTIONS]}


def request(again: bool = False) -> Any:
    """vLLM's name for the adapter; `again` loads it though one of that number is there."""
    from vllm.lora.request import LoRARequest

    return LoRARequest("policy", NUMBER, "(handed over in memory)", load_inplace=again)


def install(runner: Any, adapter: Adapter) -> None:
    """Put an adapter in the place of the one before, on this rank.

    Raises:
        UnsupportedModel: it adapts a layer that the model of vLLM lacks, or cannot adapt.
    """
    runner.lora_manager.handed = adapter
    runner.add_lora(request(again=True))


def from_memory(base: Any) -> Any:
    """A class of vLLM's worker-side LoRA managers that reads `handed` in place of a directory."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    class FromMemory(base):
        handed: Adapter | None = None

        @torch.no_grad()
        def _load_adapter(self, lora_request: Any) -> Any:
            assert self.handed is not None, "the engine asks for it after it was handed over"
            manager, config = self._adapter_manager, self.handed.config
            mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
            loaded = LoRAModel.from_lora_tensors(
                lora_request.lora_int_id,
                {name: tensor.clone() for name, tensor in self.handed.tensors.items()},
                PEFTHelper.from_dict(config.as_json(())),
                device="cpu",
                dtype=self.lora_config.lora_dtype,
                model_vocab_size=self.vocab_size,
                weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
            )
            # vLLM passes over what it has no place for, and the policy would be another one.
            packed = {name for names in manager.packed_modules.values() for name in names}
            if strangers := sorted(loaded.loras.keys() - manager.modules.keys() - packed):
                raise UnsupportedModel(
                    f"an adapter of {strangers[0]}, which vLLM's {type(manager.model).__name__} does not adapt",
                    "its linear layers", "set rollout.lora=merged",
                )  # fmt: skip
            return loaded

    return FromMemory
