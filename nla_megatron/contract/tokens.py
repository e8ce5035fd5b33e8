"""What a tokenizer makes of AR prompts: special tokens of its own, and the end that all of them have."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING

from nla_megatron.errors import ConfigError

if TYPE_CHECKING:
    from nla_megatron.contract.tokenizer import ModelTokenizer

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


def live_bos_policy(tokenizer: ModelTokenizer) -> str:
    """`"tokenizer"` when the tokenizer adds special tokens of its own to plain text, else `"none"`."""
    return "none" if tokenizer.encode("a", special=True) == tokenizer.encode("a") else "tokenizer"


def stable_suffix(tokenizer: ModelTokenizer, ar_template: str, bos_policy: str) -> tuple[int, ...]:
    """The longest id sequence that ends the AR prompt of every probe.

    Raises:
        ConfigError: the probes do not even agree on the last token.
    """
    texts = [ar_template.format(explanation="The text goes on" + end) for end in _PROBE_ENDS]
    prompts = [tokenizer.encode(text, special=bos_policy != "none")[::-1] for text in texts]
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
