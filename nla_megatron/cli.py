"""`nla-megatron COMMAND [key=value ...]`: help, and the commands of `launch`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from nla_megatron.config.compose import describe
from nla_megatron.launch.commands import COMMANDS, run


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit code: 0, 2 for a user's mistake, 1 for a run that failed."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else 2
    name = arguments[0]
    if name in COMMANDS and {"-h", "--help"} & set(arguments):
        print(f"nla-megatron {name}: {COMMANDS[name].about}\n\n{describe(name)}")
        return 0
    return run(arguments)


def _usage() -> str:
    lines = [f"  {name:<9} {command.about}" for name, command in COMMANDS.items()]
    tail = (
        "`nla-megatron COMMAND --help` lists a command's keys with their defaults.\n"
        "`nla-megatron COMMAND -m key=a,b out=DIR` runs it once for every combination of values, like `sweep COMMAND`."
    )
    return "\n".join(["usage: nla-megatron COMMAND [key=value ...]", "", *lines, "", tail])
