"""How a command ends when something is wrong: one message from whoever failed first, one exit code for all ranks."""

from __future__ import annotations

import os
import sys
import time
import traceback
from typing import Any

from nla_megatron.disk import named
from nla_megatron.errors import NlaError
from nla_megatron.parallel import started

_PATIENCE_SECONDS = 30


def exit_code_after(error: Exception) -> int:
    """Tell `error` unless another rank has told what is wrong, and answer with the exit code of the first to fail.

    Among connected ranks this does not return: an orderly exit would wait in a collective for those that are gone.
    """
    error = named(error, None) or error
    code = error.exit_code if isinstance(error, NlaError) else 1
    store = _store()
    if store is None:
        _let_rank_0_tell()
        _tell(error)
        return code
    # A rank that ends breaks its peers' collectives: what they then raise is an echo, not the mistake.
    mine = f"{started.rank()}:{code}"
    try:
        first = store.compare_set("nla_megatron/ended_first", "", mine).decode()
    except RuntimeError:
        first = ""
        print(f"rank {started.rank()} ends: rank 0, which kept the store, is gone", file=sys.stderr)
    if first == mine:
        _tell(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(first.partition(":")[2] or code))


def _tell(error: Exception) -> None:
    sys.stdout.flush()  # what is wrong is the last thing that is said
    if isinstance(error, NlaError):
        print(error, file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)


def _let_rank_0_tell() -> None:
    """Before ranks are connected rank 0 tells; the others wait for it.

    A rank that ended first would have the launcher end rank 0 in mid-sentence; one that is still there afterwards has
    met something that rank 0 has not.
    """
    if started.rank():
        time.sleep(_PATIENCE_SECONDS)


def _store() -> Any:
    """The store that connects this rank with others; None where there are none yet. Does not import torch."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return None
    return distributed.distributed_c10d._get_default_store()
