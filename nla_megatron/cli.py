"""`nla-megatron COMMAND [key=value ...]`: help, one message per mistake, exit codes."""

from __future__ import annotations

import os
import sys
import time
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
    except NlaError as error:
        if _tells():
            print(error, file=sys.stderr, flush=True)
        return _leave(error.exit_code)


def _tells() -> bool:
    """One message whoever sees the mistake first: connected ranks ask a shared counter.

    Before they are connected rank 0 tells. The others wait for it, because a rank that ended first would have the
    launcher end rank 0 in mid-sentence; one that is still there afterwards has met something rank 0 has not.
    """
    store = _store()
    if store is not None:
        return store.add("nla_megatron/told", 1) == 1
    if started.rank():
        time.sleep(_PATIENCE_SECONDS)
    return True


def _leave(code: int) -> int:
    """Leave at once when ranks are connected: an orderly exit would wait in a collective for those that are gone."""
    if _store() is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


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
