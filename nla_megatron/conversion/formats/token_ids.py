"""Token ids against the rows of a model's embedding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nla_megatron.conversion.formats.json_file import read_json
from nla_megatron.errors import CheckpointError


def check_vocabulary(directory: Path, vocab_size: int) -> None:
    """Raises CheckpointError where the tokenizer knows ids that the model has no row for.

    Placeholders of other modalities are never fed to a text model; tokenizers shared with a multimodal one have them.
    """
    unused = _placeholders(directory)
    for file, ids_of in _IDS_OF.items():
        path = directory / file
        if not path.is_file():
            continue
        try:
            ids = ids_of(read_json(path))
            largest = max((number for token, number in ids.items() if token not in unused), default=0)
        except (AttributeError, KeyError, TypeError, ValueError, IndexError):
            raise CheckpointError(f"{path} without tokens and ids", "a tokenizer's file", "download it again") from None
        if largest >= vocab_size:
            raise CheckpointError(
                f"token id {largest} in {path}", f"ids below the model's vocabulary of {vocab_size}",
                "take the model's own tokenizer, or resize the model's embedding to the tokenizer",
            )  # fmt: skip


def _fast_ids(tokenizer: dict[str, Any]) -> dict[str, int]:
    """Tokens and ids of a tokenizer.json; unigram models number their tokens by their places."""
    vocabulary = tokenizer["model"].get("vocab", ())
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {one[0]: at for at, one in enumerate(vocabulary)}
    return ids | {one["content"]: one["id"] for one in tokenizer.get("added_tokens", ())}


def _added_ids(config: dict[str, Any]) -> dict[str, int]:
    """Tokens that a tokenizer_config.json adds on its own."""
    return {one["content"]: int(number) for number, one in (config.get("added_tokens_decoder") or {}).items()}


_IDS_OF: Mapping[str, Callable[[dict[str, Any]], dict[str, int]]] = {
    "tokenizer.json": _fast_ids, "vocab.json": dict, "added_tokens.json": dict, "tokenizer_config.json": _added_ids,
}  # fmt: skip


def _placeholders(directory: Path) -> set[str]:
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return set()
    config = read_json(path)
    extra = config.get("extra_special_tokens")
    named = {**config, **(extra if isinstance(extra, dict) else {})}
    return {str(named[key]) for key in ("image_token", "audio_token", "video_token") if key in named}
