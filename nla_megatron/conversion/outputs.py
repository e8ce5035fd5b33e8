"""What a converted model computes on a text, on any layout, against transformers: logits, or an AR's vector.

Shapes: T tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nla_megatron.contract.tokenizer import load_tokenizer
from nla_megatron.conversion.checkpoint_plan import naming_metadata
from nla_megatron.conversion.formats.config_file import settled_directory
from nla_megatron.conversion.live import load_from_hf
from nla_megatron.conversion.source import HuggingFaceSide, MegatronSide
from nla_megatron.errors import MissingFile
from nla_megatron.models.batching import Batch, microbatches
from nla_megatron.models.builder import DTYPES
from nla_megatron.models.pipeline import forward_each
from nla_megatron.models.reconstructor import build_reconstructor
from nla_megatron.models.verbalizer import build_verbalizer
from nla_megatron.parallel.collectives import broadcast_object, max_over_world
from nla_megatron.parallel.cpu import megatron_device
from nla_megatron.parallel.world import World
from nla_megatron.types import Microbatch

# Of the largest output: a few roundings of the dtype in which both compute.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}


@dataclass(frozen=True)
class Outputs:
    """How far apart the outputs are at most, and the largest of them."""

    apart: float
    scale: float
    tokens: int
    dtype: str

    @property
    def same(self) -> bool:
        return self.apart <= TOLERANCE[self.dtype] * self.scale


def compare_outputs(
    one: HuggingFaceSide, other: HuggingFaceSide | MegatronSide, world: World, text: str, dtype: str
) -> Outputs:
    """`one` by transformers against `other` by Megatron on this world; collective, the same on every rank.

    Raises MissingFile where `one` has no tokenizer.
    """
    mine = None
    if world.is_main:
        ids = _ids(one, text)
        mine = ids, _by_transformers(one, ids, DTYPES[dtype])
    ids, expected = broadcast_object(mine, world)
    model, apart = _loaded(other, world, dtype), 0.0

    def visit(output: Tensor, part: Microbatch) -> None:
        nonlocal apart
        if other.model.is_ar:
            found, there = output[:1].float(), expected
        else:
            first = world.tp_rank * output.shape[-1]
            there = expected[:, first : first + output.shape[-1]]
            found = output[0, : len(ids), : there.shape[1]].float()
        if there.numel():
            distance = float((found.cpu() - there).abs().max())
            apart = max(apart, distance if distance == distance else float("inf"))

    forward_each(model, microbatches(Batch(ids=[ids]), world, 1), world, visit)
    return Outputs(max_over_world(apart, world), float(expected.abs().max()), len(ids), dtype)


def _ids(side: HuggingFaceSide, text: str) -> list[int]:
    if not any(side.directory.glob("tokenizer*")):
        raise MissingFile(
            f"no tokenizer in {side.directory}", "the model's tokenizer, for the text that both sides read",
            "copy it there, or compare the weights alone with logits=false",
        )  # fmt: skip
    ids = load_tokenizer(side.directory).encode(text, special=True)
    return list(ids)[: side.model.shape.max_positions]


@torch.no_grad()
def _by_transformers(side: HuggingFaceSide, ids: list[int], dtype: torch.dtype) -> Tensor:
    """Logits (T, V), or an AR's vector (1, D); fp32."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    kind: Any = AutoModel if side.model.is_ar else AutoModelForCausalLM
    config = AutoConfig.from_pretrained(settled_directory(side.directory))
    model = kind.from_pretrained(side.directory, config=config, dtype=dtype, attn_implementation="eager").eval()
    tokens = torch.tensor(ids)[None]
    if not side.model.is_ar:
        return model(tokens).logits[0].float()
    seen: list[Any] = []
    block = model.layers[side.model.shape.num_layers - 1]
    block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(tokens)
    stream = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    return stream.reshape(-1, stream.shape[-1])[-1:].float() @ side.value_head().T


def _loaded(side: HuggingFaceSide | MegatronSide, world: World, dtype: str) -> Any:
    """The Megatron model of a side: a checkpoint is read by megatron-core itself, so that its reading is tried too."""
    shape, is_ar = side.model.shape, side.model.is_ar
    build: Any = build_reconstructor if is_ar else build_verbalizer
    model = build(shape, world, dtype)
    if isinstance(side, MegatronSide):
        _load_checkpoint(model, side)
        return model
    load_from_hf(model, str(side.directory), shape, world, with_head=not is_ar)
    if is_ar and model.value_head is not None:
        model.value_head.load_state_dict({"weight": side.value_head()})
    return model


def _load_checkpoint(model: Any, side: MegatronSide) -> None:
    from megatron.core import dist_checkpointing

    with megatron_device(), torch.no_grad():
        wanted = model.sharded_state_dict(metadata=naming_metadata(side.plan.naming))
        # The empty states of layers are as many as the tool that saved had layers of its own.
        wanted = {name: one for name, one in wanted.items() if not name.endswith("_extra_state")}
        for one in wanted.values():
            one.key = side.reader.prefix + one.key
        loaded = dist_checkpointing.load({"model": wanted}, str(side.reader.directory))["model"]
        left = model.load_state_dict(loaded, strict=False)
    missing = [name for name in left.missing_keys if not name.endswith("_extra_state")]
    assert not missing and not left.unexpected_keys, f"{missing} {left.unexpected_keys}"
