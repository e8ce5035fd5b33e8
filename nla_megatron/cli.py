"""`nla-megatron COMMAND [key=value ...]`: help, one message per mistake, exit codes."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

from nla_megatron.config.compose import describe
from nla_megatron.errors import NlaError
from nla_megatron.launch.commands import COMMANDS, execute
from nla_megatron.parallel import started

_PATIENCE_SECONDS = 30


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit code: 0, 2 for a user's mistake, 1 for a run that failed."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else 2
    name, overrides = arguments[0], arguments[1:]
    try:
        if name in COMMANDS and {"-h", "--help"} & set(overrides):
            print(f"nla-megatron {name}: {COMMANDS[name].about}\n\n{describe(name)}")
            return 0
        return execute(name, overrides)
    except Exception as error:
        return _end(error)


def _end(error: Exception) -> int:
    """One message whoever fails first, and everybody's exit code is that of the first."""
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
    # An orderly exit would wait in a collective for those that are gone.
    os._exit(int(first.partition(":")[2] or code))


def _tell(error: Exception) -> None:
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
    """The process group's store; None before there is a group. Does not import torch."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        return None
    return distributed.distributed_c10d._get_default_store()


def _usage() -> str:
    lines = [f"  {name:<9} {command.about}" for name, command in COMMANDS.items()]
    tail = "`nla-megatron COMMAND --help` lists a command's keys with their defaults."
    return "\n".join(["usage: nla-megatron COMMAND [key=value ...]", "", *lines, "", tail])
