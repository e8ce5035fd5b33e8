"""English prose that is on every machine with Python, as a corpus: the language reference, the library's docstrings."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_SKIPPED = ("site-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__")
_MIN_CHARACTERS = 80


def documents() -> Iterator[tuple[str, str]]:
    """(doc_id, text): each topic of the reference and each module of the library is one document, in a stable order."""
    import pydoc_data.topics

    for name, text in sorted(pydoc_data.topics.topics.items()):
        yield f"python:topics:{name}", text
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not set(relative.parts) & set(_SKIPPED) and (text := _docstrings(path)):
            yield f"python:stdlib:{relative.as_posix()}", text


def _docstrings(path: Path) -> str:
    """The longer docstrings of a module, in order; nothing for a file that this Python cannot parse."""
    try:
        tree = ast.parse(path.read_text("utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return "\n\n".join(text for text in found if text and len(text) > _MIN_CHARACTERS)


def write_corpus(path: Path, limit: int | None = None) -> int:
    """Write the documents as parquet (`doc_id`, `text`); with `limit`, evenly spaced ones. Returns how many."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = list(documents())
    if limit is not None and limit < len(rows):
        rows = [rows[len(rows) * index // limit] for index in range(limit)]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"doc_id": [doc_id for doc_id, _ in rows], "text": [text for _, text in rows]}), path)
    return len(rows)
