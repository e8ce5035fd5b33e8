"""What a call is refused with, as workers report it to the test that started them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nla_megatron.errors import NlaError


def named(call: Callable[[], Any]) -> str:
    """The error's name and what was found."""
    try:
        call()
    except NlaError as error:
        return f"{type(error).__name__}: {error.found}"
    return "no error"
