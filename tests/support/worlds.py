"""Worlds without processes, for code that only reads coordinates."""

from __future__ import annotations

from typing import Any, cast

import torch

from nla_megatron.parallel.world import World


def world_of(*, tp: int = 1, pp: int = 1, dp: int = 1, tp_rank: int = 0, pp_rank: int = 0, dp_rank: int = 0) -> World:
    """One process of tp x pp x dp on the CPU; it has no process group, so nothing collective can be called."""
    return World(
        rank=tp_rank + tp * (dp_rank + dp * pp_rank),
        size=tp * pp * dp,
        tp=tp,
        pp=pp,
        dp=dp,
        tp_rank=tp_rank,
        pp_rank=pp_rank,
        dp_rank=dp_rank,
        device=torch.device("cpu"),
        control=cast(Any, None),
    )
