"""The task `sae`: a text task's prompts, answered by a frozen model that is steered with SAE features.

The policy is who chooses how strongly: a predictor that reads each prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from nla_megatron.config.options import bind
from nla_megatron.config.schema import TaskConfig
from nla_megatron.errors import ConfigError, MissingFile, WidthError
from nla_megatron.hub import model_directory
from nla_megatron.interventions.checks import check_layers
from nla_megatron.interventions.sae_files import load_sae
from nla_megatron.interventions.sae_lookup import find_sae
from nla_megatron.interventions.schedules import Schedule
from nla_megatron.interventions.spec import SAE_MODES, Intervention
from nla_megatron.interventions.steering import formula_of
from nla_megatron.models.strength import PredictorConfig
from nla_megatron.models.strength_files import read_description
from nla_megatron.types import ModelShape

OPTIONS = "task.options"
OBJECTIVES = ("rl", "mse")
REFERENCES = ("unsteered", "predictor")


@dataclass(frozen=True)
class InterventionOptions:
    """One place that is steered: fields of `interventions.spec.Intervention`, the SAE as a path or as it is published.

    `sae`: a directory of `sae_lens`, or a safetensors file beside its cfg.json; or `release` and `sae_id`, looked for
    in `sae_roots` and in the hub's cache. Several layers are several of these.
    """

    layer: int | str
    mode: str = "features"
    where: str = "generated"
    features: tuple[int, ...] = ()
    max_acts: tuple[float, ...] = ()
    strength: float = 1.0
    schedule: dict[str, Any] = field(default_factory=dict)
    sae: str | None = None
    release: str | None = None
    sae_id: str | None = None


@dataclass(frozen=True)
class PredictorOptions:
    """The predictor; `path`: an exported one to begin with, whose own form goes before all of these.

    The others are those of `models.strength.PredictorConfig`: `strength_min` and `strength_max` bound what is
    multiplied by `strength_scale`.
    """

    path: str | None = None
    hidden: int = 1024
    layers: int = 2
    dropout: float = 0.1
    activation: str = "relu"
    strength_min: float = -5.0
    strength_max: float = 5.0
    strength_scale: float = 1.0
    initial_strength: float | None = None

    @property
    def form(self) -> list[str]:
        """What is set besides the path."""
        return [each.name for each in fields(self) if each.name != "path" and getattr(self, each.name) != each.default]

    @property
    def config(self) -> PredictorConfig:
        """Raises ConfigError: as `PredictorConfig`."""
        return PredictorConfig(
            self.hidden, self.layers, self.dropout, self.activation, self.strength_min, self.strength_max,
            self.strength_scale, self.initial_strength,
        )  # fmt: skip


@dataclass(frozen=True)
class SaeOptions:
    """Options of the task `sae`.

    Args:
        steering: false trains the model itself on the same prompts and rewards, without any intervention.
        objective: "rl": the algorithm's loss through the steered log-probs; "mse": towards the `target_strengths` of
            the rows of `data`, without sampling anything.
        prompts: the text task, with `name` and `options`, whose prompts and measurements these are.
        interventions: what is steered, each as `InterventionOptions`.
        predictor: as `PredictorOptions`.
        sae_roots: directories in which releases are looked for before the hub's cache.
        reference: what a KL term compares with where `algorithm.reference` is "initial": the "unsteered" model, or the
            model steered by the "predictor" as it began.
        compare_samples: responses to each held-out prompt, steered and not, when the two are compared.
        prompt_column: of the rows of `data`, for the objective "mse".
        fixed_strengths: for `eval` in the place of a predictor: one for all, or one for each strength.
    """

    steering: bool = True
    objective: str = "rl"
    prompts: dict[str, Any] = field(default_factory=lambda: {"name": "lexical"})
    interventions: list[dict[str, Any]] = field(default_factory=list)
    predictor: dict[str, Any] = field(default_factory=dict)
    sae_roots: list[str] = field(default_factory=list)
    reference: str = "unsteered"
    compare_samples: int = 1
    prompt_column: str = "prompt"
    fixed_strengths: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        for key, allowed in (("objective", OBJECTIVES), ("reference", REFERENCES)):
            if getattr(self, key) not in allowed:
                raise ConfigError(
                    f"{key}={getattr(self, key)!r}", f"one of {', '.join(allowed)}", f"set {OPTIONS}.{key}"
                )
        if self.compare_samples < 1:
            raise ConfigError(f"compare_samples={self.compare_samples}", "1 or more", "raise it")
        if not all(map(math.isfinite, self.fixed_strengths)):
            raise ConfigError(f"fixed_strengths={list(self.fixed_strengths)}", "finite numbers", "correct them")
        if self.objective == "mse" and not self.steering:
            raise ConfigError("objective=mse with steering=false", "a predictor to train", "set steering=true, or rl")

    @property
    def text_task(self) -> TaskConfig:
        """Whose prompts these are."""
        given = bind(_Prompts, self.prompts, f"{OPTIONS}.prompts")
        return TaskConfig(given.name, given.options)

    @property
    def predictor_options(self) -> PredictorOptions:
        bound = bind(PredictorOptions, self.predictor, f"{OPTIONS}.predictor")
        return bound if bound.path is None else replace(bound, path=model_directory(bound.path, "predictor.path"))

    def steered(self) -> tuple[Intervention, ...]:
        """The interventions, each SAE by its path.

        Raises:
            ConfigError: none, one of a mode without an SAE, or options that do not go together.
            MissingFile: an SAE that is not on this machine.
        """
        if not self.interventions:
            raise ConfigError(
                f"no {OPTIONS}.interventions", "at least one place to steer", "add one, with layer, sae and features"
            )
        return tuple(self._steered(number, each) for number, each in enumerate(self.interventions))

    def _steered(self, number: int, given: Mapping[str, Any]) -> Intervention:
        where = f"{OPTIONS}.interventions[{number}]"
        options = bind(InterventionOptions, given, where)
        if options.mode not in SAE_MODES:
            raise ConfigError(
                f"{where}.mode={options.mode!r}", f"one of {', '.join(SAE_MODES)}", "set a mode that an SAE steers in"
            )
        if options.strength == 0:
            raise ConfigError(f"{where}.strength=0", "a number that strengths are multiplied with", "set it, say to 1")
        named = (options.release is not None, options.sae_id is not None)
        if named[0] != named[1] or named[0] == (options.sae is not None):
            raise ConfigError(
                f"{where} with sae={options.sae!r}, release={options.release!r}, sae_id={options.sae_id!r}",
                "either a path in sae, or release and sae_id", "name the SAE in one of the two ways",
            )  # fmt: skip
        path = options.sae
        if options.release is not None and options.sae_id is not None:
            path = str(find_sae(options.release, options.sae_id, self.sae_roots))
        return Intervention(
            options.layer, options.mode, options.where, options.strength,
            bind(Schedule, options.schedule, f"{where}.schedule"),
            sae=path, features=options.features, max_acts=options.max_acts,
        )  # fmt: skip


@dataclass(frozen=True)
class _Prompts:
    """The text task."""

    name: str = "lexical"
    options: dict[str, Any] = field(default_factory=dict)


def sae_options(config: TaskConfig) -> SaeOptions:
    """Raises ConfigError for an unknown key, a wrong type, or values that cannot be meant."""
    return bind(SaeOptions, config.options, OPTIONS)


def check_steering(options: SaeOptions, shape: ModelShape) -> tuple[tuple[Intervention, ...], PredictorConfig]:
    """Everything about SAEs and predictor that can be known from their files and the model's shape.

    Raises:
        ConfigError: a layer beyond the model, features that an SAE lacks, clamped ones that point the same way.
        WidthError: an SAE or a predictor of another width, or one with another number of strengths.
        MissingFile, CheckpointError, UnsupportedModel: an SAE or a predictor that cannot be read.
    """
    interventions = options.steered()
    check_places(interventions, shape)
    return interventions, predictor_config(options, interventions, shape)


def check_places(interventions: Sequence[Intervention], shape: ModelShape) -> None:
    """What of `check_steering` is of the SAEs."""
    check_layers(interventions, shape.num_layers)
    for each in interventions:
        assert each.sae is not None
        formula_of(each, shape.hidden_size, load_sae(each.sae))


def check_model(model: str) -> None:
    """Raises MissingFile where this is no Hugging Face directory."""
    if not Path(model, "config.json").is_file():
        raise MissingFile(
            f"no config.json in model={model!r}", "the Hugging Face directory of the model that is steered",
            "add model=DIRECTORY",
        )  # fmt: skip


def predictor_config(options: SaeOptions, interventions: Sequence[Intervention], shape: ModelShape) -> PredictorConfig:
    """The form of the predictor: of the options, or of the exported one that training begins with.

    Raises:
        WidthError: an exported one of another model, or for other interventions.
        MissingFile, CheckpointError: one that cannot be read.
    """
    chosen = options.predictor_options
    if chosen.path is None:
        return chosen.config
    described = read_description(chosen.path)
    wanted = sum(each.num_strengths for each in interventions)
    if (described.width, described.strengths) != (shape.hidden_size, wanted):
        raise WidthError(
            f"the predictor {chosen.path} makes {described.strengths} strengths of features {described.width} wide",
            f"{wanted} strengths of {shape.hidden_size}, by the model and {OPTIONS}.interventions",
            "use a predictor of this model and these interventions, or drop predictor.path",
        )
    if other := chosen.form:
        raise ConfigError(
            f"{OPTIONS}.predictor.{other[0]} beside predictor.path", "the form that the file has", f"drop {other[0]}"
        )
    return described.config


def without_steering(config: Any, options: SaeOptions) -> Any:
    """An `rl` configuration of the text task alone."""
    return replace(config, task=options.text_task)
