"""What is particular to a Natural Language Autoencoder: injection, curriculum, the AR's head and loss, templates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nla_megatron.config.schema.checks import at_least, one_of
from nla_megatron.errors import ConfigError
from nla_megatron.types import POOLINGS, VECTOR_MODES

METHODS = (*VECTOR_MODES, "project")


@dataclass(frozen=True)
class ProjectionConfig:
    """A learned map of the activation, trained with the AV, one for each block at which it enters (docs/method.md)."""

    then: str = "norm_add"
    """How the mapped vector enters, as a method does, with `intervention.scale`."""
    layers: int = 1
    """1: a matrix and a bias, which start as the identity. More: so many less one of linear, LayerNorm, ReLU and
    dropout come before it."""
    dropout: float = 0.0
    """Behind each ReLU, in `sft` alone: a sampler has none, so `rl` has none."""

    def __post_init__(self) -> None:
        one_of("intervention.projection.then", self.then, VECTOR_MODES)
        at_least("intervention.projection.layers", self.layers, 1)
        if not 0 <= self.dropout < 1 or (self.dropout and self.layers == 1):
            raise ConfigError(
                f"intervention.projection.dropout={self.dropout} with layers={self.layers}",
                "0 or above, below 1; 0 where there is one layer", "set intervention.projection.dropout",
            )  # fmt: skip


@dataclass(frozen=True)
class InterventionConfig:
    """How the activation enters the AV's residual stream (docs/method.md)."""

    method: str = "norm_add"
    layer: int = 1
    """Output of this block, 0-based: 1 is the second block, where the published recipe injects. -1 is the token
    embedding, after any factor that the model applies to it."""
    scale: float = 1.0
    """alpha of norm_add and add; the norm s of replace; of project what it is to `projection.then`."""
    layers: list[int] | None = None
    """Several blocks at once, each changed by the same vector, method and scale. None: `layer` alone."""
    projection: ProjectionConfig = field(default_factory=ProjectionConfig)
    """With method project."""

    def __post_init__(self) -> None:
        one_of("intervention.method", self.method, METHODS)
        if self.method != "project" and self.projection != ProjectionConfig():
            raise ConfigError(
                f"{self.projection} with intervention.method={self.method}", "options of the method project",
                "set intervention.method=project, or remove intervention.projection",
            )  # fmt: skip
        for block in self.blocks:
            at_least("intervention.layer" if self.layers is None else "intervention.layers", block, -1)
        if not self.blocks or len(set(self.blocks)) != len(self.blocks):
            raise ConfigError(f"intervention.layers={list(self.blocks)}", "different blocks", "set intervention.layers")

    @property
    def blocks(self) -> tuple[int, ...]:
        """Every block at which the vector enters."""
        return (self.layer,) if self.layers is None else tuple(self.layers)


@dataclass(frozen=True)
class CurriculumConfig:
    """From an injection that is easy to read to the one that the table records, over the first steps of a training.

    The last step always trains on the recorded injection, and every evaluation uses it.
    """

    kind: str = "constant"
    """How the factor on the injection's strength leads from `start` to 1: linear, cosine, or constant, at 1 always."""
    start: float = 1.0
    """The factor at step 0."""
    layers: list[int] = field(default_factory=list)
    """Blocks at which the vector enters in turn, each for an equal part of the steps, before it enters at its own."""
    steps: int = 0
    """Training steps until the injection is the recorded one; 0 is no curriculum."""

    def __post_init__(self) -> None:
        one_of("curriculum.kind", self.kind, ("constant", "linear", "cosine"))
        at_least("curriculum.steps", self.steps, 0)
        at_least("curriculum.start", self.start, 0.0)
        for block in self.layers:
            at_least("curriculum.layers", block, -1)
        if (self.kind == "constant") != (self.start == 1.0):
            raise ConfigError(
                f"curriculum.kind={self.kind} with curriculum.start={self.start}",
                "constant at 1, or linear or cosine from another factor", "set both",
            )  # fmt: skip
        if (self.kind != "constant" or bool(self.layers)) != (self.steps > 0) or len(self.layers) > self.steps:
            raise ConfigError(
                f"curriculum.steps={self.steps} with kind {self.kind} and layers {list(self.layers)}",
                "as many steps as there are layers or more; 0 where nothing changes", "set curriculum.steps",
            )  # fmt: skip


def check_curriculum_ends(curriculum: CurriculumConfig, steps: int) -> None:
    """Raises ConfigError where training would end on another injection than the model's sidecar says."""
    if curriculum.steps >= steps:
        raise ConfigError(
            f"curriculum.steps={curriculum.steps} of steps={steps}", "fewer: the last step trains on what is recorded",
            "lower curriculum.steps",
        )  # fmt: skip


@dataclass(frozen=True)
class ArConfig:
    """How the AR makes a vector of its stream; recorded in its sidecar, from which `rl` and `eval` take it."""

    pooling: str = "last"
    """Over a text's tokens: the last, their mean, their max, cls (the first, which in a causal model has read nothing
    of what follows it) or weighted (by a softmax over one learned number for each position)."""
    projection_layers: int = 1
    """1: a matrix. More: so many less one of linear, LayerNorm, ReLU and dropout come before it."""
    dropout: float = 0.0
    """Behind each ReLU; of a single layer, before it."""
    layer: int | None = None
    """Read behind this block, 0-based; deeper ones are not kept. None: K, the block of the activations."""

    def __post_init__(self) -> None:
        one_of("reconstructor.pooling", self.pooling, POOLINGS)
        at_least("reconstructor.projection_layers", self.projection_layers, 1)
        if not 0 <= self.dropout < 1:
            raise ConfigError(
                f"reconstructor.dropout={self.dropout}", "0 or above, below 1", "set reconstructor.dropout"
            )
        if self.layer is not None:
            at_least("reconstructor.layer", self.layer, 0)


@dataclass(frozen=True)
class ArLossConfig:
    """What the AR is trained on. Scores, rewards and FVE are the mean squared error of the contract whatever it is."""

    kind: str = "mse"
    """mse or smooth_l1 of prediction and activation, both at norm sqrt(D); or cosine, 1 less their cosine."""
    weight: float = 1.0
    """Factor on it, against the two regularisers."""
    smooth_l1_beta: float = 1.0
    """Below this difference smooth_l1 is quadratic."""
    l2_reg: float = 0.0
    """Factor on the mean square of the predictions, as the head gives them."""
    variance_reg: float = 0.0
    """Factor on the mean squared difference of the standard deviations, in each dimension, of predictions and
    activations over the global batch, both at norm sqrt(D). It costs one more forward pass."""

    def __post_init__(self) -> None:
        one_of("ar_loss.kind", self.kind, ("mse", "smooth_l1", "cosine"))
        for key in ("weight", "l2_reg", "variance_reg"):
            at_least(f"ar_loss.{key}", getattr(self, key), 0.0)
        if not self.smooth_l1_beta > 0:
            raise ConfigError(f"ar_loss.smooth_l1_beta={self.smooth_l1_beta}", "above 0", "set ar_loss.smooth_l1_beta")


@dataclass(frozen=True)
class TemplateConfig:
    """Prompt templates; None takes the contract's own (`nla_megatron.contract.prompts`)."""

    av: str | None = None
    ar: str | None = None
    marker: str | None = None
    """A single token that stands for the activation. None: a character of U+3200..U+33FF, or where the tokenizer has
    none that is one token, another rare character or a reserved token."""
    format: str = "chat"
    """chat: the AV's prompt is a user's message in the tokenizer's chat template. plain: it is the template alone, for
    a base model, which has no chat template; its end is where the response begins."""
    date: str | None = None
    """The day (2026-01-31) that a chat template which writes one is told; the tables keep the prompt. None: today."""
    chat_options: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template, such as `enable_thinking`; `chat_template` names one of several templates."""
    positions: int = 1
    """How often the marker stands in the AV's prompt: the same vector at each, or of a table of `pool=stack` each one
    at its own, and then as many. A template of your own holds `<INJECT>` so many times, each between the same
    neighbours. With `pool_least` it stays 1: the word that holds `<INJECT>` is repeated for each of a row's."""

    def __post_init__(self) -> None:
        at_least("templates.positions", self.positions, 1)
        one_of("templates.format", self.format, ("chat", "plain"))
        if self.format == "plain" and (self.date is not None or self.chat_options):
            raise ConfigError(
                f"templates.date={self.date} and chat_options={self.chat_options} with templates.format=plain",
                "neither: they are a chat template's", "leave them out, or set templates.format=chat",
            )  # fmt: skip
