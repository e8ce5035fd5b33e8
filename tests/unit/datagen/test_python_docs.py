"""The corpus that every Python has: stable, unique, and evenly thinned out."""

from __future__ import annotations

from pathlib import Path

import pytest

from nla_megatron.contract.corpus import read_corpus
from nla_megatron.datagen import python_docs


@pytest.fixture(scope="module")
def documents() -> list[tuple[str, str]]:
    return list(python_docs.documents())


def test_ids_are_unique_and_texts_are_texts(documents: list[tuple[str, str]]) -> None:
    assert len({doc_id for doc_id, _ in documents}) == len(documents) > 500
    assert all(doc_id.startswith(("python:topics:", "python:stdlib:")) and text.strip() for doc_id, text in documents)
    assert not [doc_id for doc_id, _ in documents if "site-packages" in doc_id or "/test/" in doc_id]


def test_documents_come_in_an_order_that_no_file_system_decides(documents: list[tuple[str, str]]) -> None:
    topics, modules = (
        [doc_id.removeprefix(kind) for doc_id, _ in documents if doc_id.startswith(kind)]
        for kind in ("python:topics:", "python:stdlib:")
    )
    assert len(topics) + len(modules) == len(documents) and documents[0][0].startswith("python:topics:")
    assert topics == sorted(topics) and modules == sorted(modules, key=lambda name: Path(name).parts)


def test_known_documents_are_there(documents: list[tuple[str, str]]) -> None:
    texts = dict(documents)
    assert "Manipulators" not in texts["python:stdlib:json/__init__.py"]
    assert "JSON (JavaScript Object Notation)" in texts["python:stdlib:json/__init__.py"]
    assert "lambda" in texts["python:topics:lambda"]


def test_a_limit_takes_evenly_spaced_documents_in_the_same_order_every_time(
    documents: list[tuple[str, str]], tmp_path: Path
) -> None:
    path = tmp_path / "deep" / "corpus.parquet"
    assert python_docs.write_corpus(path, limit=7) == 7
    assert read_corpus(path) == [documents[len(documents) * index // 7] for index in range(7)]


def test_short_docstrings_and_broken_files_are_left_out(tmp_path: Path) -> None:
    long = "A docstring that says more than its function's name does, at some length and with some care."
    source = tmp_path / "module.py"
    source.write_text(f'"""Short."""\n\n\nclass A:\n    """{long}"""\n\n    def f(self):\n        """{long[::-1]}"""\n')
    assert python_docs._docstrings(source) == f"{long}\n\n{long[::-1]}"
    source.write_text("def broken(:")
    assert python_docs._docstrings(source) == ""
    source.write_bytes(b'"""\xff\xfe"""')
    assert python_docs._docstrings(source) == ""
