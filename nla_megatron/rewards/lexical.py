"""How rich a response's vocabulary is. Shapes: N rollouts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nla_megatron.errors import ConfigError
from nla_megatron.rewards.terms import Term, register
from nla_megatron.types import Measured


@dataclass(frozen=True)
class LexicalOptions:
    """What a short response costs."""

    brevity_penalty_scale: float = 1.0
    """What a response without words loses."""
    words: int = 80
    """From so many words on, a response loses nothing."""

    def __post_init__(self) -> None:
        if self.words < 1:
            raise ConfigError(f"words={self.words}", "at least 1", "raise it")


@register("lexical_richness")
class LexicalRichness(Term):
    """unique / total lower-case words - scale·max(0, (80 - total)/80); a word is what stands between white space.

    Read from the task's answer; where it found none, there are no words: -scale.
    """

    options: LexicalOptions

    def __call__(self, measured: Measured) -> Tensor:
        return torch.tensor([self._of(text or "") for text in measured.texts])

    def _of(self, text: str) -> float:
        words = text.lower().split()
        richness = len(set(words)) / len(words) if words else 0.0
        missing = max(0, self.options.words - len(words)) / self.options.words
        return richness - self.options.brevity_penalty_scale * missing
