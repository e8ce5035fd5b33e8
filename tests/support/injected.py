"""Seven rows whose prompts take an activation, for Megatron and for transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from nla_megatron.config.schema import OptimConfig
from nla_megatron.models.batching import Batch, response_mask

LAYER, POSITION, PROMPT, STEPS = 1, 3, 6, 3
LENGTHS = (9, 14, 7, 11, 12, 8, 10)
OPTIM = OptimConfig(lr=1e-3, warmup_steps=0, schedule="constant", clip_grad=0.5)


def rows(shape: Any) -> SimpleNamespace:
    """Seven rows of unequal length, so that no layout divides them evenly."""
    rng = np.random.default_rng(7)
    return SimpleNamespace(
        ids=[rng.integers(3, shape.vocab_size, length).tolist() for length in LENGTHS],
        vectors=rng.standard_normal((len(LENGTHS), shape.hidden_size)).astype(np.float32) * 5,
    )


def av_batch(data: SimpleNamespace) -> Batch:
    lengths = [len(row) for row in data.ids]
    return Batch(
        ids=data.ids,
        fields={"mask": response_mask([PROMPT] * len(lengths), lengths, max(lengths))},
        positions=[POSITION] * len(lengths),
        vectors=lambda chosen: data.vectors[list(chosen)],
    )


@contextmanager
def injected(model: Any, vector: torch.Tensor) -> Iterator[None]:
    """Inside, a transformers model adds the vector to its residual stream, at the stream's own norm."""

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        stream = output[0] if isinstance(output, tuple) else output
        here = (torch.arange(stream.shape[1]) == POSITION)[None, :, None]
        size = stream.norm(dim=-1, keepdim=True)
        stream = torch.where(here, stream + size * vector / vector.norm(), stream)
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    handle = model.model.layers[LAYER].register_forward_hook(hook)
    yield
    handle.remove()


@contextmanager
def captured(model: Any, layer: int) -> Iterator[list[torch.Tensor]]:
    """Inside, what a layer puts out for each row that the model reads, (T, D)."""
    seen: list[torch.Tensor] = []
    handle = model.model.layers[layer].register_forward_hook(
        lambda module, inputs, output: seen.append((output[0] if isinstance(output, tuple) else output).flatten(0, -2))
    )
    yield seen
    handle.remove()
