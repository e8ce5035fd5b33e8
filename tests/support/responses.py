"""Two short responses to prompts of three tokens, as a batch that a policy or a critic learns from."""

from __future__ import annotations

from typing import Any

from nla_megatron.models.batching import Batch, response_mask

IDS, PROMPT = [[5, 6, 7, 8, 9], [5, 6, 7, 10]], 3


def responses(**fields: Any) -> Batch:
    """With the field `mask`; `fields` are further ones of `Batch`."""
    lengths = [len(row) for row in IDS]
    return Batch(ids=IDS, fields={"mask": response_mask([PROMPT] * 2, lengths, max(lengths))}, **fields)
