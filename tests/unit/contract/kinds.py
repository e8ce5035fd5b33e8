"""Small tokenizers of the kinds that models come with: made as each family's `tokenizer.json` is, of few tokens."""

from __future__ import annotations

import json
from functools import cache
from pydoc_data.topics import topics
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [topics[key] for key in sorted(topics)[:12]]
MARKER = "㈎"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
TURNS = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_QWEN = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@cache
def _bytes_file(special: str, more: str = "", split: str | None = None, nfc: bool = False) -> str:
    """Byte-level BPE. `more`: characters that become tokens by merges, as those of a large vocabulary do."""
    core = Tokenizer(models.BPE())
    steps = [] if split is None else [pre_tokenizers.Split(Regex(split), behavior="isolated")]
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)]
    )
    core.decoder, core.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=True)
    if nfc:
        core.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special.split(), initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([*TEXTS, *(f"{each}1" * 3000 for each in more)], trainer)
    return str(core.to_str())


@cache
def _pieces_file(special: str, more: str = "", legacy: bool = True) -> str:
    """SentencePiece's BPE as converted: spaces become "▁" (one is put in front), bytes are the fallback."""
    core = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    replace = normalizers.Replace(" ", "▁")
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if legacy else replace
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if legacy else steps)
    spelled = [f"<0x{byte:02X}>" for byte in range(256)]
    words = [text.replace(" ", "▁") for text in " ".join(TEXTS).split("\n")]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<unk>", *special.split(), *spelled], show_progress=False, max_token_length=8
    )
    core.train_from_iterator([*words, *more], trainer)
    # Fallback bytes are ordinary tokens of the vocabulary, not special ones.
    content = json.loads(core.to_str())
    content["added_tokens"] = [one for one in content["added_tokens"] if not one["content"].startswith("<0x")]
    return json.dumps(content)


def _bytes(*what: Any, **more: Any) -> Tokenizer:
    return Tokenizer.from_str(_bytes_file(*what, **more))


def _pieces(*what: Any, **more: Any) -> Tokenizer:
    return Tokenizer.from_str(_pieces_file(*what, **more))


def _begin(core: Tokenizer, bos: str) -> None:
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, core.token_to_id(bos))]
    )


def qwen(chat: str | None = CHATML, marker: bool = True) -> PreTrainedTokenizerFast:
    core = _bytes("<|endoftext|> <|im_start|> <|im_end|>", MARKER if marker else "", _QWEN, nfc=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=chat
    )


def smollm() -> PreTrainedTokenizerFast:
    """Too few tokens for the marker's range; box drawings are among them, since code is."""
    core = _bytes("<|endoftext|> <|im_start|> <|im_end|> <reponame>", "█═►")
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", chat_template=CHATML)


def gpt2() -> PreTrainedTokenizerFast:
    core = _bytes("<|endoftext|>")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>"
    )


def llama2(more: str = "給", chat: str | None = INST) -> PreTrainedTokenizerFast:
    """No symbol but those of English text; one letter of Chinese; bytes for everything else."""
    core = _pieces("<s> </s>", more)
    _begin(core, "<s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=chat
    )


def mistral() -> PreTrainedTokenizerFast:
    core = _pieces("<s> </s> [INST] [/INST]", "♪")
    _begin(core, "<s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=INST
    )


def gemma() -> PreTrainedTokenizerFast:
    core = _pieces("<eos> <bos> <start_of_turn> <end_of_turn>", legacy=False)
    core.add_tokens([AddedToken(f"<unused{number}>", normalized=False) for number in range(3)])
    _begin(core, "<bos>")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", chat_template=TURNS
    )


KINDS = {"qwen": qwen, "smollm": smollm, "gpt2": gpt2, "llama2": llama2, "mistral": mistral, "gemma": gemma}
