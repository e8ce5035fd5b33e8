"""The commands that make tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from nla_megatron.config.schema.checks import DTYPES, at_least, one_of
from nla_megatron.config.schema.nla import InterventionConfig, TemplateConfig
from nla_megatron.config.schema.shared import StageConfig
from nla_megatron.errors import ConfigError


@dataclass(frozen=True)
class ProviderConfig:
    """Which provider explains, and its own options."""

    name: str = "keywords"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ExtractConfig(StageConfig):
    """Activations of a model at sampled positions of a corpus."""

    model: str = MISSING
    corpus: str = MISSING
    """A parquet or JSONL file with the columns `doc_id` and `text`."""
    layer: int | None = None
    """K: the output of this block. None: two thirds of the depth, rounded down."""
    max_length: int = 2048
    long_documents: str = "truncate"
    """truncate: the first max_length tokens. window: consecutive windows, each sampled like a document of its own."""
    min_position: int = 50
    positions_per_doc: int = 10
    pool: str = "last"
    """last: the activation of a sampled position. mean: the mean of the last `pool_window` positions' up to it. stack:
    its own, and beside it those of the `pool_window` - 1 positions before it, which the AV reads too."""
    pool_window: int = 1
    pool_least: int | None = None
    """With pool=stack: a row keeps the activations of as many of the last `pool_window` positions as there are, and a
    position with fewer than `pool_least` is not sampled. None: every row keeps `pool_window`."""
    pool_within: str = "passage"
    """Where there are positions to keep, with `pool_least`. passage: in the document, or its window. sentence: in the
    position's own sentence alone, which ends where space follows . ! ? or …, or at an empty line."""
    documents_start: int = 0
    documents_length: int | None = None
    batch_size: int = 8
    dtype: str = "float32"

    def __post_init__(self) -> None:
        one_of("long_documents", self.long_documents, ("truncate", "window"))
        one_of("dtype", self.dtype, DTYPES)
        at_least("batch_size", self.batch_size, 1)
        at_least("positions_per_doc", self.positions_per_doc, 1)
        at_least("min_position", self.min_position, 0)
        at_least("max_length", self.max_length, self.min_position + 1)
        one_of("pool", self.pool, ("last", "mean", "stack"))
        at_least("pool_window", self.pool_window, 1)
        if self.pool == "last" and self.pool_window > 1:
            raise ConfigError(f"pool_window={self.pool_window} with pool=last", "pool=mean or pool=stack", "set pool=")
        if self.pool == "stack" and self.pool_window < 2:
            raise ConfigError(f"pool_window={self.pool_window} with pool=stack", "at least 2", "set pool_window=")
        self._check_least()
        if self.pool_least is None and self.pool_window > self.min_position + 1:
            remedy = "raise min_position=" + (", or set pool_least=" if self.pool == "stack" else "")
            raise ConfigError(
                f"pool_window={self.pool_window} with min_position={self.min_position}",
                f"at most {self.min_position + 1}, so that every window is full", remedy,
            )  # fmt: skip

    def _check_least(self) -> None:
        one_of("pool_within", self.pool_within, ("passage", "sentence"))
        if self.pool_least is None:
            if self.pool_within != "passage":
                raise ConfigError(
                    f"pool_within={self.pool_within} without pool_least", "the fewest activations that a row may keep",
                    "set pool_least=1, or more",
                )  # fmt: skip
        elif self.pool != "stack" or not 1 <= self.pool_least < self.pool_window:
            raise ConfigError(
                f"pool_least={self.pool_least} with pool={self.pool} and pool_window={self.pool_window}",
                "pool=stack, and 1 or more, below pool_window", "set pool_least, or leave it out",
            )  # fmt: skip


@dataclass(frozen=True)
class ExplainConfig(StageConfig):
    """Gold explanations for the rows of a base table."""

    input: str = MISSING
    provider: ProviderConfig = field(default_factory=ProviderConfig)
    max_failures: float = 0.2
    """A larger share of failed rows stops the stage (docs/method.md)."""


@dataclass(frozen=True)
class BuildConfig(StageConfig):
    """Document-level splits of an explained table into the tables of the training stages."""

    input: str = MISSING
    model: str = MISSING
    missing_explanations: str = "refuse"
    """What is done with rows whose explanation is null or blank. refuse: the first one is named. drop: they are left
    out of every table, and counted in `build.json`."""
    held_out: float = 0.05
    fractions: dict[str, float] = field(default_factory=lambda: {"av_sft": 0.25, "ar_sft": 0.25, "rl": 0.5})
    templates: TemplateConfig = field(default_factory=TemplateConfig)
    intervention: InterventionConfig = field(default_factory=InterventionConfig)

    def __post_init__(self) -> None:
        one_of("missing_explanations", self.missing_explanations, ("refuse", "drop"))
