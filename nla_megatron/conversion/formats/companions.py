"""Files that lie beside the weights of a model directory and go along with them: tokenizer, templates, notes."""

from __future__ import annotations

import os
from pathlib import Path

from nla_megatron.errors import MissingFile

_PATTERNS = ("*.json", "*.model", "*.txt", "*.jinja", "*.yaml")


def check_companions(directory: Path) -> None:
    """Raises MissingFile for one that is there by name alone.

    Whoever looks for it would take it as absent, and whoever copies it at a run's end would fail there.
    """
    for path in sorted(path for pattern in _PATTERNS for path in directory.glob(pattern)):
        what = ""
        if path.is_symlink() and not path.exists():
            what = "a link to a file that is not there"
        elif not path.is_file():
            what = "a directory, or another thing that is no file"
        elif not os.access(path, os.R_OK):
            what = "not to be read: its permissions forbid it"
        if what:
            raise MissingFile(f"{path} is {what}", "a whole model directory", "download or copy this file again")
