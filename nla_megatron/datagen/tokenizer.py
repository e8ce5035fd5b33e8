"""A byte-level BPE tokenizer with a chat template, trained on a corpus, for models that start from nothing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

END_OF_TEXT, TURN_END = "<|endoftext|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
WHOLE_TOKENS = ("<explanation>", "</explanation>", "<concept>", "</concept>", "<text>", "</text>", "<summary>", "㈎")
"""Tags and marker as one token each: a small model has better things to learn than to spell them."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, out: Path) -> int:
    """Train on `texts` and write a directory for `AutoTokenizer`; returns the vocabulary's size, with added tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [END_OF_TEXT, TURN_END, *ROLES]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(WHOLE_TOKENS),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in WHOLE_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=TURN_END, pad_token=END_OF_TEXT, additional_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.save_pretrained(out)
    return len(fast)
