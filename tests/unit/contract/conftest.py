"""Small real tokenizers: byte-level BPE trained on Python's own documentation, with a chat template."""

from __future__ import annotations

from collections.abc import Callable
from pydoc_data.topics import topics

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

MARKER = "㈎"
CHAT = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def build_tokenizer(
    vocab_size: int = 600, added: tuple[str, ...] = (MARKER,), bos: bool = False, chat: str | None = CHAT
) -> PreTrainedTokenizerFast:
    """`bos`: both the chat template and the post-processor write a BOS, as Gemma's and Llama's do."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|start|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([topics[key] for key in sorted(topics)[:25]], trainer)
    core.add_tokens([AddedToken(text, normalized=False) for text in added])
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", core.token_to_id("<|bos|>"))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|bos|>", eos_token="<|end|>")
    tokenizer.chat_template = chat and ("{{ bos_token }}" + chat if bos else chat)
    return tokenizer


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return build_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def bos_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(bos=True)


@pytest.fixture(scope="session")
def other_tokenizer() -> PreTrainedTokenizerFast:
    """The same marker is one token here too, but ids differ."""
    return build_tokenizer(vocab_size=500)


@pytest.fixture(scope="session")
def split_marker_tokenizer() -> PreTrainedTokenizerFast:
    """Every character of the marker's range is three byte tokens."""
    return build_tokenizer(added=())
