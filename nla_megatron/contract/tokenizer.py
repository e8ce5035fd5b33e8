"""A model's tokenizer, wrapped once: its ids, where responses end, and its chat template.

Nothing else loads a tokenizer, calls its template or asks for its end token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from nla_megatron.contract.chat import Messages, Rendered, name_of, render
from nla_megatron.errors import ConfigError, MissingFile, NlaError
from nla_megatron.reading import read_object, read_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    AnyTokenizer: TypeAlias = "PreTrainedTokenizerFast | ModelTokenizer"

_PLAIN_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")
_VOCABULARIES = (("vocab.json", "merges.txt"), ("tokenizer.model",), ("vocab.txt",), ("tekken.json",))
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "chat_template.json",
)  # fmt: skip
_ANSWER = "zxqanswerqxz"  # stands for an answer; no template has it


@dataclass(frozen=True)
class Encoded:
    """Token ids of a text, and of each its first character and the one after its last."""

    ids: list[int]
    offsets: list[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class ModelTokenizer:
    """A fast tokenizer of transformers (`fast`), and the directory whose model it is of, if it came from one.

    Ids are of whole texts: what a `tokenizer.json` says of padding and truncation is for other uses.

    Example:
        >>> tokenizer = load_tokenizer("models/Qwen3-8B")
        >>> tokenizer.encode("a text"), tokenizer.end_ids
    """

    fast: PreTrainedTokenizerFast
    directory: Path | None = None

    def __post_init__(self) -> None:
        self.fast.backend_tokenizer.no_padding()
        self.fast.backend_tokenizer.no_truncation()

    def __len__(self) -> int:
        """Tokens of the vocabulary, added ones included."""
        return len(self.fast)

    @property
    def name(self) -> str:
        """What messages call it."""
        return name_of(self.fast)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of a text; `special` adds what the tokenizer adds by habit, such as a BOS."""
        ids: list[int] = self.fast(text, add_special_tokens=special)["input_ids"]
        return ids

    def encode_each(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """`encode` of many texts at once."""
        ids: list[list[int]] = self.fast(list(texts), add_special_tokens=special)["input_ids"]
        return ids

    def encode_located(self, texts: Sequence[str], special: bool = False) -> list[Encoded]:
        """`encode` of texts, with where in its text each token stands."""
        found = self.fast(list(texts), add_special_tokens=special, return_offsets_mapping=True)
        return [Encoded(*both) for both in zip(found["input_ids"], found["offset_mapping"], strict=True)]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text of token ids, with no space taken away or added."""
        text = self.fast.decode(list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
        return str(text)

    def beginning(self, text: str, special: bool) -> Encoded:
        """A text that a model goes on from: a beginning is never written twice (by the text and by the tokenizer),
        and an end of the tokenizer's own never.
        """
        [encoded] = self.encode_located([text], special)
        ids, start, stop = encoded.ids, 0, len(encoded.ids)
        if stop > 1 and ids[0] == ids[1] == self.fast.bos_token_id is not None:
            start = 1
        if special and stop - start > 1 and ids[-1] in self.end_ids and not text.endswith(self.decode(ids[-1:])):
            stop -= 1
        return Encoded(ids[start:stop], encoded.offsets[start:stop])

    @property
    def has_chat(self) -> bool:
        """Whether there is a chat template."""
        return bool(self.fast.chat_template)

    def render(self, messages: Messages, options: Mapping[str, Any] | None = None, day: date | None = None) -> Rendered:
        """The text of a chat, as `chat.render` says, with its errors."""
        return render(self.fast, messages, options, day)

    @cached_property
    def declared_ends(self) -> tuple[int, ...]:
        """Every id that the tokenizer or a file of its model says ends a text, the tokenizer's own first; none where
        nobody says so. Ids that the tokenizer does not have are never written, and left out.
        """
        own = [] if self.fast.eos_token_id is None else [self.fast.eos_token_id]
        ids = [*own, *(each for each in _ends_of_model(self.directory) if each < len(self))]
        return tuple(dict.fromkeys(ids))

    @property
    def end_ids(self) -> tuple[int, ...]:
        """As `declared_ends`: a sampler stops at each of them, and none is part of a response's text."""
        return self.declared_ends

    def check_ends(self) -> None:
        """Raises ConfigError where nothing ends a response."""
        if not self.end_ids:
            raise ConfigError(
                f"tokenizer {self.name} has no end token, and its model's generation_config.json and config.json have "
                "no eos_token_id", "an EOS token, which ends responses",
                "name one as eos_token in tokenizer_config.json",
            )  # fmt: skip

    @cached_property
    def end_id(self) -> int:
        """What ends a document: the tokenizer's own end token, or the first that its model declares."""
        self.check_ends()
        return self.end_ids[0]

    @cached_property
    def turn_end_id(self) -> int:
        """What ends a response: the first of `end_ids` that the chat template writes behind an answer.

        `end_id` where it writes none of them, and where there is no chat.
        """
        self.check_ends()
        turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": _ANSWER}]
        try:
            text = render(self.fast, turns, answer=False).text
        except ConfigError:  # then the template is none for answers, or none at all
            return self.end_id
        behind = self.encode(text.rpartition(_ANSWER)[2]) if _ANSWER in text else []
        return next((each for each in behind if each in self.end_ids), self.end_id)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that are no text: named special tokens, added ones marked as such, and ends."""
        added = self.fast.added_tokens_decoder.items()
        marked = {number for number, token in added if token.special}
        return frozenset({*self.fast.all_special_ids, *marked, *self.end_ids})

    def config_ids(self) -> dict[str, int | None]:
        """What `config.json` of a model with this tokenizer says of it."""
        return {
            "eos_token_id": self.fast.eos_token_id,
            "bos_token_id": self.fast.bos_token_id,
            "pad_token_id": self.fast.pad_token_id,
        }

    def as_it_stands(self) -> ModelTokenizer | None:
        """The same by its `tokenizer.json` word for word; None where it is read so already, or there is no file."""
        if self.directory is None or not (self.directory / "tokenizer.json").is_file() or _is_plain(self.directory):
            return None
        return ModelTokenizer(as_it_stands(self.directory), self.directory)

    def text_of(self, ids: Sequence[int]) -> str:
        """A response's text: without the token that ended it."""
        return self.decode(ids[:-1] if ids and ids[-1] in self.end_ids else ids)


def wrapped(tokenizer: AnyTokenizer) -> ModelTokenizer:
    """A tokenizer of transformers, wrapped; one that is wrapped already as it is."""
    if isinstance(tokenizer, ModelTokenizer):
        return tokenizer
    directory = Path(tokenizer.name_or_path) if tokenizer.name_or_path else None
    return ModelTokenizer(tokenizer, directory if directory is not None and directory.is_dir() else None)


def load_tokenizer(directory: str | Path) -> ModelTokenizer:
    """The tokenizer of a Hugging Face directory.

    Raises:
        MissingFile: there is none.
        ConfigError: transformers cannot load it, or has no fast one for it.
    """
    directory = Path(directory)
    there = any(all((directory / name).is_file() for name in names) for names in (("tokenizer.json",), *_VOCABULARIES))
    if not there:
        raise MissingFile(
            f"no tokenizer.json in {directory}", "a Hugging Face directory with a fast tokenizer",
            "copy the tokenizer there",
        )  # fmt: skip
    for path in sorted(directory.glob("*.jinja")):
        read_text(path, ConfigError)  # any text is a template, that of a pointer to the file too
    try:
        fast = _loaded(directory)
    except NlaError:
        raise
    except Exception as error:  # the readers of tokenizer files raise whatever they come upon
        _check_files(directory)
        raise ConfigError(
            f"the tokenizer in {directory} cannot be loaded: {type(error).__name__}: {error}",
            "tokenizer.json and tokenizer_config.json as transformers saves them", "copy the tokenizer there again",
        ) from error  # fmt: skip
    if not getattr(fast, "is_fast", False):
        raise ConfigError(
            f"transformers has no fast tokenizer for {directory} ({type(fast).__name__})", "a tokenizer.json",
            "save the tokenizer's fast form there",
        )  # fmt: skip
    return ModelTokenizer(fast, directory)


def _check_files(directory: Path) -> None:
    """Raises ConfigError for a file of a tokenizer whose bytes are not what its name says. Not asked of those that
    load: they are large."""
    for path in sorted(directory.glob("*.json")):
        if path.name in _TOKENIZER_FILES:
            read_object(path, ConfigError, "copy it again", mark=False)
    for path in sorted((*directory.glob("merges.txt"), *directory.glob("vocab.txt"))):
        read_text(path, ConfigError)


def _loaded(directory: Path) -> Any:
    # AutoTokenizer imports every model to find a special class; a plain one says so itself, and loads in a second.
    if (directory / "tokenizer.json").is_file() and _is_plain(directory):
        return as_it_stands(directory)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


def _is_plain(directory: Path) -> bool:
    return _json(directory / "tokenizer_config.json").get("tokenizer_class") in _PLAIN_TOKENIZERS


def as_it_stands(directory: Path) -> PreTrainedTokenizerFast:
    """What `tokenizer.json` says, word for word.

    From its version 5 on, transformers makes the tokenizers of many classes anew from their vocabulary and the
    class's own rules, which need not be the file's.
    """
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(directory)


def keep_as_it_stands(directory: Path) -> None:
    """From now on the tokenizer of a directory is read as `as_it_stands` says, by whoever loads it."""
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**_json(path), "tokenizer_class": _PLAIN_TOKENIZERS[0]}, indent=2) + "\n")


def read_backend(path: Path) -> Tokenizer:
    """A `tokenizer.json` for counting, without what it says of padding and truncation. Raises ConfigError."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises no narrower class
        raise ConfigError(f"{path} cannot be read: {error}", "a tokenizer.json", "copy it again") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _ends_of_model(directory: Path | None) -> list[int]:
    """`eos_token_id` of the files beside a model: an id, a list of them, or nothing.

    Raises:
        ConfigError: anything else.
    """
    ids: list[int] = []
    for name in () if directory is None else ("generation_config.json", "config.json"):
        content = _json(directory / name) if directory is not None else {}
        inner = content.get("text_config")
        for block in (content, inner if isinstance(inner, dict) else {}):
            value = block.get("eos_token_id")
            listed = value if isinstance(value, list) else [] if value is None else [value]
            if any(isinstance(each, bool) or not isinstance(each, int) or each < 0 for each in listed):
                raise ConfigError(
                    f"eos_token_id is {value!r} in {directory}/{name}", "a token id, or a list of them",
                    "correct the file",
                )  # fmt: skip
            ids += listed
    return ids


def _json(path: Path) -> dict[str, Any]:
    """The mapping of a file; empty where there is no file. Raises ConfigError."""
    if not path.is_file():
        return {}
    return read_object(path, ConfigError, "copy it again", mark=False)
