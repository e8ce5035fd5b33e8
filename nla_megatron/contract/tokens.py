"""What a tokenizer makes of the prompts: encoding, chat template, special tokens, the stable end of the AR prompt."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, Any

from nla_megatron.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Ends an explanation can have. Byte-pair merges reach across the border to the template's suffix, so the stable part of
# the suffix is what all of these agree on.
_PROBE_ENDS = [
    *string.ascii_letters[::7],
    *string.digits[::3],
    *string.punctuation,
    *" \n\t",
    "\n\n",
    ".\n",
    ' "',
    "</",
]
_PROBE_ENDS += ["”", "’", "…", "—", "é", "中", "。", "я", "🙂", "</explanation>"]


def name_of(tokenizer: PreTrainedTokenizerFast) -> str:
    """What messages call a tokenizer: where it was loaded from."""
    return tokenizer.name_or_path or type(tokenizer).__name__


def encode(tokenizer: PreTrainedTokenizerFast, text: str, special: bool = False) -> list[int]:
    """Token ids of a text; `special` adds what the tokenizer adds by habit, such as a BOS."""
    ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    return ids


def single_id(tokenizer: PreTrainedTokenizerFast, marker: str) -> int | None:
    """The marker's id, or None when it is several tokens, unknown, or another text once decoded."""
    ids = encode(tokenizer, marker)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        return None
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return ids[0] if text == marker else None


def templated_ids(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]) -> list[int]:
    """Ids of a chat up to where the assistant answers; all special tokens in it are the chat template's."""
    if not tokenizer.chat_template:
        raise ConfigError(
            f"tokenizer {name_of(tokenizer)!r} has no chat template",
            "a chat template, which frames the AV's prompt",
            "use the instruction-tuned model's tokenizer, or set a chat template in tokenizer_config.json",
        )
    ids: Any = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    return list(ids)


def live_bos_policy(tokenizer: PreTrainedTokenizerFast) -> str:
    """`"tokenizer"` when the tokenizer adds special tokens of its own to plain text, else `"none"`."""
    return "none" if encode(tokenizer, "a", special=True) == encode(tokenizer, "a") else "tokenizer"


def stable_suffix(tokenizer: PreTrainedTokenizerFast, ar_template: str, bos_policy: str) -> tuple[int, ...]:
    """The longest id sequence that ends the AR prompt of every probe.

    Raises:
        ConfigError: the probes do not even agree on the last token.
    """
    texts = [ar_template.format(explanation="The text goes on" + end) for end in _PROBE_ENDS]
    prompts = [encode(tokenizer, text, special=bos_policy != "none")[::-1] for text in texts]
    suffix: list[int] = []
    for column in zip(*prompts, strict=False):
        if len(set(column)) > 1:
            break
        suffix.append(column[0])
    if not suffix:
        raise ConfigError(
            f"the AR template ends with {ar_template[-20:]!r}, whose last token depends on the explanation",
            "a fixed last token, where the reconstruction is read",
            "end the AR template with plain words, as the default one does",
        )
    return tuple(reversed(suffix))
