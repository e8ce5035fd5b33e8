"""The tokenizer of a GGUF file as the model was trained with it.

transformers rebuilds vocabulary and merges, and leaves out two things that the file says: whether a sequence begins
with the BOS, without which some models write nonsense, and how text is cut before the merges.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nla_megatron.errors import UnsupportedModel

_KEY = "tokenizer.ggml."


def load(gguf: Path) -> Any:
    """Raises UnsupportedModel where the file names a way of cutting text that is not known here."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    said = _said(gguf)
    _cut(tokenizer.backend_tokenizer, said.get("pre", "default"))
    if said.get("add_bos_token", False):
        _begin(tokenizer)
    return tokenizer


def _said(gguf: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    fields = GGUFReader(gguf).fields
    return {name: fields[_KEY + name].contents() for name in ("pre", "add_bos_token") if _KEY + name in fields}


def _cut(backend: Any, name: str) -> None:
    from tokenizers import pre_tokenizers

    if name == "smollm":  # each digit is a token of its own
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    elif name != "default":
        raise UnsupportedModel(f"{_KEY}pre = {name!r}", "smollm or default", "take another model")


def _begin(tokenizer: Any) -> None:
    from tokenizers import processors

    bos = tokenizer.bos_token
    tokenizer.add_bos_token = True
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
