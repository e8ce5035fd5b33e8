"""An intervention as data: what happens to the residual stream, behind which block, at which tokens, how strongly.

Nothing here computes. The formulas are in `maths` and `steering`, the tokens in `placement`, and what a request may
ask for is checked in `checks`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from nla_megatron.errors import ConfigError
from nla_megatron.interventions.schedules import Schedule
from nla_megatron.types import VECTOR_MODES

EMBEDDING = "embedding"
TOKEN_EMBEDDING = -1
"""How sidecars and configurations, whose layers are numbers, write `EMBEDDING`."""
SAE_MODES = ("features", "clamp", "global")
MODES = (*VECTOR_MODES, "project", *SAE_MODES)
WHERE = ("positions", "prompt", "generated", "all")


@dataclass(frozen=True)
class Intervention:
    """What happens to the residual stream at one place. Several layers at once are several interventions.

    With x the full residual stream at a token, v the request's vector, s the strength and d̂ the unit decoder direction
    of a feature, the modes are
        norm_add   x + s·|x|·v/|v|
        replace    s·v/|v|
        add        x + s·v
        project    Wv + b in the place of v, then the mode `then`
        features   x + dec(f′) − dec(f), f = enc(x), f′ᵢ = max_actᵢ·sᵢ for the features named (the SAE's error stays)
        clamp      x with the component along each feature's d̂ set to max_actᵢ·sᵢ
        global     x + dec(s·f) − dec(f)

    Args:
        layer: the output of this block (0-based), or "embedding": what enters block 0.
        mode: one of `MODES`.
        where: one of `WHERE`: "positions" that each request names in its prompt, the whole "prompt", the tokens that
            were "generated" (as inputs: the first of them is sampled from the prompt's last position, which is not one
            of them), or "all".
        strength: alpha, or the norm of `replace`; for the SAE modes it multiplies the request's strengths.
        schedule: a further factor, over training or decode steps.
        then: the vector mode that follows `project`.
        vector_width: width of the vectors that `project` takes; None is the hidden size.
        projection_layers: of `project`; 1 is linear.
        vectors: how many a row brings: 1 is its own at every position; of several, the i-th enters at the i-th
            position, and its own is the last.
        fewest: of several, a row may bring fewer, at least so many, and has as many positions; None is `vectors`.
        sae: path that `sae_files.load_sae` reads, for the SAE modes.
        features: the SAE's features that `features` and `clamp` set; `global` scales all and names none.
        max_acts: largest activation of each feature named; empty is 1 for each.

    Raises:
        ConfigError: an unknown mode or place, a strength that cannot be meant, or options of another mode.

    Example:
        >>> Intervention(1, "norm_add").place
        'block 1'
    """

    layer: int | str
    mode: str = "norm_add"
    where: str = "positions"
    strength: float = 1.0
    schedule: Schedule = field(default_factory=Schedule)
    then: str = "norm_add"
    vector_width: int | None = None
    projection_layers: int = 1
    vectors: int = 1
    fewest: int | None = None
    sae: str | None = None
    features: tuple[int, ...] = ()
    max_acts: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _one_of("mode", self.mode, MODES)
        _one_of("where", self.where, WHERE)
        _one_of("then", self.then, VECTOR_MODES)
        is_block = isinstance(self.layer, int) and not isinstance(self.layer, bool) and self.layer >= 0
        if not is_block and self.layer != EMBEDDING:
            raise ConfigError(f"layer={self.layer!r}", f"a block, 0 or more, or {EMBEDDING!r}", "set layer")
        self._check_strength()
        self._check_vectors()
        self._check_projection()
        self._check_features()

    def _check_strength(self) -> None:
        value = self.strength
        if not math.isfinite(value):
            raise ConfigError(f"strength={value}", "a finite number", "set strength")
        if self.formula == "replace" and value <= 0:
            raise ConfigError(f"strength={value} of replace", "the norm of what replaces the stream", "set strength")
        if self.takes_vectors and value == 0:
            raise ConfigError(f"strength=0 of {self.mode}", "a strength that does something", "remove the intervention")

    def _check_vectors(self) -> None:
        if self.vectors != 1 and not (self.vectors > 1 and self.takes_vectors and self.where == "positions"):
            raise ConfigError(
                f"vectors={self.vectors} of {self.mode} at {self.where!r}",
                "1, or several where vectors enter at positions", "set vectors",
            )  # fmt: skip
        if self.fewest is not None and not 1 <= self.fewest < self.vectors:
            raise ConfigError(
                f"fewest={self.fewest} of vectors={self.vectors}", "1 or more, below vectors", "set fewest, or leave it"
            )

    def _check_projection(self) -> None:
        if self.mode != "project" and (self.vector_width is not None or self.projection_layers != 1):
            raise ConfigError(
                f"vector_width={self.vector_width}, projection_layers={self.projection_layers} with mode {self.mode}",
                "options of project", "set mode=project, or remove them",
            )  # fmt: skip
        if self.projection_layers < 1 or (self.vector_width is not None and self.vector_width < 1):
            raise ConfigError(
                f"vector_width={self.vector_width}, projection_layers={self.projection_layers}",
                "positive numbers", "set them",
            )  # fmt: skip

    def _check_features(self) -> None:
        named = self.mode in ("features", "clamp")
        if (self.sae is None) != self.takes_vectors:
            wanted = "no SAE" if self.takes_vectors else "the path of an SAE"
            raise ConfigError(f"sae={self.sae!r} with mode {self.mode}", wanted, "set sae, or another mode")
        if bool(self.features) != named:
            wanted = "at least one feature" if named else "none: only features and clamp name any"
            raise ConfigError(f"{len(self.features)} features with mode {self.mode}", wanted, "set features")
        if len(set(self.features)) != len(self.features) or any(index < 0 for index in self.features):
            raise ConfigError(f"features={list(self.features)}", "different indices, 0 or more", "set features")
        if self.max_acts and len(self.max_acts) != len(self.features):
            raise ConfigError(
                f"{len(self.max_acts)} max_acts for {len(self.features)} features", "one each, or none", "set max_acts"
            )
        if not all(math.isfinite(value) and value > 0 for value in self.max_acts):
            raise ConfigError(f"max_acts={list(self.max_acts)}", "positive finite numbers", "set max_acts")

    @property
    def formula(self) -> str:
        """The mode that meets the stream: `then` where the vectors are projected first."""
        return self.then if self.mode == "project" else self.mode

    @property
    def takes_vectors(self) -> bool:
        """Each request brings a vector; otherwise it brings strengths only."""
        return self.mode not in SAE_MODES

    def takes(self, vectors: int) -> bool:
        """Whether a row may bring so many vectors."""
        return (self.vectors if self.fewest is None else self.fewest) <= vectors <= self.vectors

    @property
    def counts(self) -> str:
        """How many vectors a row brings, for messages."""
        return f"{self.vectors}" if self.fewest is None else f"{self.fewest} to {self.vectors}"

    @property
    def num_strengths(self) -> int:
        """F: how many strengths a request has: one per feature named, else one."""
        return len(self.features) or 1

    @property
    def place(self) -> str:
        """For messages."""
        return str(self.layer) if self.layer == EMBEDDING else f"block {self.layer}"

    def strengths(self, request: Sequence[float] | None = None, training_step: int = 0) -> tuple[float, ...]:
        """The F strengths of a request's slot: everything but the schedule over decode steps.

        Args:
            request: the request's own strengths, one or F of them; None is 1.
            training_step: the trainer's step, for a schedule over training.

        Raises:
            ConfigError: another number of strengths, or one that is not finite.
        """
        given = (1.0,) if request is None else tuple(float(value) for value in request)
        if len(given) not in (1, self.num_strengths) or not all(math.isfinite(value) for value in given):
            raise ConfigError(
                f"strengths {list(given)} of a request, for {self.mode} at {self.place}",
                f"{self.num_strengths} finite numbers, or one for all", "correct the request",
            )  # fmt: skip
        factor = self.schedule.factor(training_step) if self.schedule.over == "training" else 1.0
        whole = given if len(given) == self.num_strengths else given * self.num_strengths
        return tuple(self.strength * factor * value for value in whole)

    def decode_factors(self) -> tuple[float, ...]:
        """The factor of decode steps 0, 1, …; the last one holds for every later step."""
        return self.schedule.factors() if self.schedule.over == "decode" else (1.0,)

    @classmethod
    def recorded(
        cls,
        method: str,
        layer: int,
        scale: float,
        vectors: int = 1,
        then: str = "norm_add",
        layers: int = 1,
        fewest: int | None = None,
    ) -> Intervention:
        """The one that a sidecar or a configuration describes; `then` and `layers` are of a projection."""
        place = EMBEDDING if layer == TOKEN_EMBEDDING else layer
        return cls(place, method, strength=scale, vectors=vectors, fewest=fewest, then=then, projection_layers=layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for another process."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Intervention:
        """What `to_dict` gave, also after a round trip through JSON."""
        kept = dict(values)
        kept["schedule"] = Schedule(**kept.get("schedule", {}))
        kept["features"] = tuple(kept.get("features", ()))
        kept["max_acts"] = tuple(kept.get("max_acts", ()))
        return cls(**kept)


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{key}={value!r} of an intervention", f"one of {', '.join(allowed)}", f"set {key}")
