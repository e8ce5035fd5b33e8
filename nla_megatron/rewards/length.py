"""What a response's length is worth. Shapes: N rollouts; n is a length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from omegaconf import MISSING
from torch import Tensor

from nla_megatron.contract.tokenizer import read_backend
from nla_megatron.errors import ConfigError, MissingFile
from nla_megatron.hub import model_directory
from nla_megatron.rewards.outcome import well_formed
from nla_megatron.rewards.terms import Term, named_values, register
from nla_megatron.types import Measured

if TYPE_CHECKING:
    from tokenizers import Tokenizer

UNITS = ("response_tokens", "tokenizer", "words", "value")


@dataclass(frozen=True)
class LengthOptions:
    """What is counted."""

    unit: str = "response_tokens"
    """`response_tokens`: what the policy wrote, its end token included. `tokenizer`: the text's tokens under the option
    `tokenizer`. `words`: the text's, between white space. `value`: a task's own count."""
    tokenizer: str | None = None
    """With unit `tokenizer`: a tokenizer.json, or a directory that has one."""
    value: str | None = None
    """With unit `value`: the task's named value, such as `thinking_tokens`."""
    of: str = "response"
    """With units `tokenizer` and `words`: the whole response, or the `answer` that the task found in it (nothing where
    there is none)."""

    def __post_init__(self) -> None:
        for name, value, choices in (("unit", self.unit, UNITS), ("of", self.of, ("response", "answer"))):
            if value not in choices:
                raise ConfigError(f"{name}={value!r}", f"one of {', '.join(choices)}", f"set {name} to one of these")
        for name in ("tokenizer", "value"):
            given, asked = getattr(self, name), self.unit == name
            if (given is not None) != asked:
                raise ConfigError(
                    f"unit={self.unit} with {name}={given!r}", f"{name} with unit {name} alone", f"set or remove {name}"
                )


class LengthTerm(Term):
    """What the terms of this file share: how long each response is."""

    options: LengthOptions

    def __init__(self, options: LengthOptions):
        super().__init__(options)
        if options.tokenizer is not None:
            assert self._tokenizer is not None

    def needs(self) -> tuple[str, ...]:
        return () if self.options.value is None else (self.options.value,)

    def lengths(self, measured: Measured) -> Tensor:
        """(N,) fp32."""
        options = self.options
        if options.unit == "value":
            assert options.value is not None
            return named_values(measured, options.value, self.name)
        if options.unit == "response_tokens":
            return torch.tensor([float(len(rollout.response_ids)) for rollout in measured.rollouts])
        if options.of == "answer":
            texts: Sequence[str] = [text or "" for text in measured.texts]
        else:
            texts = [rollout.text for rollout in measured.rollouts]
        if options.unit == "words":
            return torch.tensor([float(len(text.split())) for text in texts])
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return torch.tensor([float(len(one.ids)) for one in encoded])

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        path = Path(model_directory(str(self.options.tokenizer), "tokenizer", ("tokenizer*",)))
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise MissingFile(f"no {path}", "a fast tokenizer's tokenizer.json", "correct the option tokenizer")
        return read_backend(path)


@dataclass(frozen=True)
class RelativeLengthOptions(LengthOptions):
    """What is counted, and what is malformed."""

    format_value: str | None = None
    """A task's named value that is 0 where a response is malformed. None: where the task found no answer."""


@register("length")
class RelativeLength(LengthTerm):
    """max(0, 1 - n / mean n of the group): 0 at the group's mean, 1 for an empty response.

    Malformed responses score 0 and do not enter the mean, or a group could raise it by breaking the form. Where no
    response of a group is well-formed, or their mean is 0, all of it scores 0.
    """

    options: RelativeLengthOptions

    def needs(self) -> tuple[str, ...]:
        own = self.options.format_value
        return (*super().needs(), *(() if own is None else (own,)))

    def __call__(self, measured: Measured) -> Tensor:
        n_N, groups_N = self.lengths(measured).double(), measured.groups
        good_N = well_formed(measured, self.options.format_value, self.name) > 0
        return relative_length(n_N, groups_N, good_N).float()


def relative_length(n_N: Tensor, groups_N: Tensor, good_N: Tensor) -> Tensor:
    """max(0, 1 - n / mean n of the good ones of its group), 0 where that mean is not positive or one is not good."""
    count = int(groups_N.max()) + 1
    weights_N = good_N.to(n_N.dtype)
    good = torch.zeros(count, dtype=n_N.dtype).index_add_(0, groups_N, weights_N)
    total = torch.zeros(count, dtype=n_N.dtype).index_add_(0, groups_N, torch.where(good_N, n_N, 0.0))
    mean_N = (total / good.clamp_min(1))[groups_N]
    scores_N = (1 - n_N / torch.where(mean_N > 0, mean_N, 1.0)).clamp_min(0)
    return torch.where(good_N & (mean_N > 0), scores_N, 0.0)


@dataclass(frozen=True)
class HingeOptions(LengthOptions):
    """What is counted, and where the hinge is."""

    cap: int = MISSING
    """The longest response; in the configuration `${rollout.max_new_tokens}`."""
    margin: int = 64
    """Lengths up to cap - margin cost nothing."""
    penalty: float = 0.01
    """Of each one beyond."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.penalty < 0:
            raise ConfigError(f"penalty={self.penalty}", "at least 0", "a penalty is subtracted already")
        if not 0 <= self.margin <= self.cap:
            raise ConfigError(f"margin={self.margin} with cap={self.cap}", "0 to cap", "lower margin")


@register("length_hinge")
class LengthHinge(LengthTerm):
    """-penalty·max(0, n - (cap - margin)): nothing until a response comes close to where it would be cut."""

    options: HingeOptions

    def __call__(self, measured: Measured) -> Tensor:
        free = self.options.cap - self.options.margin
        return -self.options.penalty * (self.lengths(measured) - free).clamp_min(0)


@dataclass(frozen=True)
class PerTokenOptions(LengthOptions):
    """What is counted, and what one costs."""

    penalty: float = 0.001
    """Of each one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.penalty < 0:
            raise ConfigError(f"penalty={self.penalty}", "at least 0", "a penalty is subtracted already")


@register("length_per_token")
class LengthPerToken(LengthTerm):
    """-penalty·n."""

    options: PerTokenOptions

    def __call__(self, measured: Measured) -> Tensor:
        return -self.options.penalty * self.lengths(measured)


@dataclass(frozen=True)
class OverlongOptions(LengthOptions):
    """What is counted, and where the punishment begins and ends."""

    cap: int = MISSING
    """The longest response; in the configuration `${rollout.max_new_tokens}`."""
    buffer: int = MISSING
    """The punishment grows over so many before the cap."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.buffer <= self.cap:
            raise ConfigError(f"buffer={self.buffer} with cap={self.cap}", "1 to cap", "lower buffer")


@register("overlong")
class Overlong(LengthTerm):
    """DAPO's soft overlong punishment (Yu et al., 2025, eq. 13): 0 up to cap - buffer, then down to -1 at the cap."""

    options: OverlongOptions

    def __call__(self, measured: Measured) -> Tensor:
        start = self.options.cap - self.options.buffer
        return ((start - self.lengths(measured)) / self.options.buffer).clamp(-1, 0)
