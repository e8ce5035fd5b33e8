"""Where gold explanations come from: one interface, one registry, one module per provider.

A provider is shown the text up to and including a position and writes what a reader of the activation there should say.
`keywords` needs no network; `anthropic` asks a model. A new provider is a class with `@register(name)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nla_megatron.config.registry import Registry
from nla_megatron.errors import ConfigError


@dataclass(frozen=True)
class ExplainRequest:
    """One row to explain.

    Args:
        row: the caller's number for the row; it comes back in the `Explanation`.
        text: the text up to and including the position whose activation is explained.

    Example:
        >>> ExplainRequest(row=7, text="The cat sat on")
    """

    row: int
    text: str


@dataclass(frozen=True)
class Explanation:
    """What a provider says about one row: exactly one of `text` and `error` is set.

    Args:
        row: the row of the request it answers.
        text: the explanation, one feature per line, without the tags around it; None when the provider failed here.
        error: why it failed; None when it did not.

    Example:
        >>> Explanation(row=7, text="last: on\\nbefore: cat sat\\nabout: cats", error=None)
    """

    row: int
    text: str | None
    error: str | None


# Fewer features than this say too little about an activation to learn from; such a row fails.
MIN_FEATURES = 2


class Provider(Protocol):
    """Writes explanations. Options are the keyword arguments of the class, checked when it is made."""

    name: str

    def fit(self, documents: Iterable[str]) -> None:
        """Learns what the whole corpus has in common, one string per document. Optional to call."""

    def explain(self, requests: Sequence[ExplainRequest]) -> Iterator[Explanation]:
        """Yields exactly one `Explanation` per request, in any order.

        Raises:
            ProviderError: no row can be explained (key refused, model unknown). What was yielded before stays valid.
        """

    def summary(self) -> dict[str, Any]:
        """The sidecar's `api_summaries` block: `model`, `max_tokens`, `temperature`, `instruction_prompt`."""


class BaseProvider:
    """What providers share: the name `register` gives them, and a `fit` that needs nothing from the corpus."""

    name: str = ""

    def fit(self, documents: Iterable[str]) -> None:
        """Does nothing; `documents` is not even iterated."""

    def explain(self, requests: Sequence[ExplainRequest]) -> Iterator[Explanation]:
        raise NotImplementedError

    def summary(self) -> dict[str, Any]:
        raise NotImplementedError


_PROVIDERS: Registry[type[BaseProvider]] = Registry("provider", named=True)
register = _PROVIDERS.register
"""Class decorator: makes a provider known to `make_provider` by name."""


def make_provider(name: str, **options: object) -> Provider:
    """The provider `name` with these options; the rest keep their defaults.

    Raises:
        ConfigError: an unknown name or option (the known ones are listed), or a value the provider does not take.
    """
    # Registers ours; inside, because the modules import the names above.
    from nla_megatron.datagen.providers import anthropic, keywords  # noqa: F401

    if name not in _PROVIDERS:
        raise ConfigError(
            f"explanation provider {name!r}", f"one of {', '.join(sorted(_PROVIDERS))}", "correct the provider's name"
        )
    cls = _PROVIDERS[name]
    known = inspect.signature(cls).parameters
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(
            f"option {', '.join(unknown)} of the provider {name!r}",
            f"some of {', '.join(known)}",
            "remove or correct the option",
        )
    return cls(**options)
