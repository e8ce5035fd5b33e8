"""What a reader passes over is said, once."""

from __future__ import annotations

import sys

from nla_megatron.parallel import started

_SAID: set[str] = set()


def say_once(text: str) -> None:
    """A line for the user on stderr: from rank 0, and once however many readers open the same directory."""
    if text not in _SAID and started.rank() == 0:
        print(f"note: {text}", file=sys.stderr)
    _SAID.add(text)
