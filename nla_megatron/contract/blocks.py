"""The nested blocks of a sidecar, and their strict reading.

Readers of other trainers refuse an unknown key inside these blocks, so their keys are exactly the shared ones; what we
add stands at the top level of a sidecar.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from nla_megatron.errors import SidecarError

Block = TypeVar("Block")

_REMEDY = "mend this key in the sidecar, or write the file again with the stage that made it"


@dataclass(frozen=True)
class Tokens:
    """`tokens`: the marker and the ids around it; `critic_suffix_ids` end every AR prompt."""

    injection_char: str
    injection_token_id: int
    injection_left_neighbor_id: int
    injection_right_neighbor_id: int
    critic_suffix_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class PromptTemplates:
    """`prompt_templates`: AV with `<INJECT>`, AR with `{explanation}`, as `PromptContract` has them."""

    av: str
    ar: str | None = None


@dataclass(frozen=True)
class AvPromptSpec:
    """`av_prompt`, our extension: how the AV's message becomes the text that it reads, and that text.

    `format`: chat, in the tokenizer's chat template, or plain, the message alone. `text`: what comes of it, with
    `<INJECT>`, so that the prompt stays the same whenever and by whomever it is used. `date`: the day that the chat
    template was told, where it writes one. `chat_options`: variables of the chat template.
    """

    format: str = "chat"
    text: str | None = None
    date: str | None = None
    chat_options: dict[str, Any] | None = None

    def same_prompt(self, other: AvPromptSpec) -> bool:
        """Whether both give one prompt; a text that is not recorded may be any."""
        return self.format == other.format and (None in (self.text, other.text) or self.text == other.text)


@dataclass(frozen=True)
class CorpusSlice:
    """`extraction.corpus_slice`: documents `start` to `start + length` of the corpus."""

    start: int
    length: int


@dataclass(frozen=True)
class DatasetExtraction:
    """`extraction` of a data set: where the activations come from. `norm` is `"none"`: files hold raw vectors."""

    base_model: str
    d_model: int
    layer_index: int
    corpus: str
    corpus_slice: CorpusSlice
    positions_per_doc: int
    norm: str = "none"


@dataclass(frozen=True)
class ModelExtraction:
    """`extraction` of a model: block index K, and the scales (a norm, `"sqrt_d_model"`, or None for raw vectors)."""

    layer_index: int | None = None
    injection_scale: float | str | None = None
    mse_scale: float | str | None = "sqrt_d_model"


@dataclass(frozen=True)
class ApiSummaries:
    """`api_summaries`: how the gold explanations were asked for."""

    model: str
    max_tokens: int
    temperature: float
    instruction_prompt: str


@dataclass(frozen=True)
class ProjectionSpec:
    """`injection.projection`: how the learned map of the vector is made, and the method by which its result enters.

    `layers`: 1 is linear. `dropout`: between layers, in supervised training.
    """

    then: str = "norm_add"
    layers: int = 1
    dropout: float = 0.0


@dataclass(frozen=True)
class InjectionSpec:
    """`injection`, our extension: method (`norm_add`, `replace`, ...), block (-1: token embedding), and scale.

    `layers`: all blocks at which the vector enters, where they are several; `layer` is the first of them. `projection`:
    of the method `project`, and of no other.
    """

    method: str
    layer: int
    scale: float | str | None = None
    layers: tuple[int, ...] | None = None
    projection: ProjectionSpec | None = None

    @property
    def blocks(self) -> tuple[int, ...]:
        """Every block at which the vector enters."""
        return (self.layer,) if self.layers is None else self.layers


@dataclass(frozen=True)
class PoolSpec:
    """`pool`, our extension: what a row keeps of the last `window` positions up to its own.

    `mean`: one activation, the mean over them. `stack`: all of them, those before its own in `preceding_vectors`.
    `least`: of `stack`, a row may keep fewer, at least so many; None is `window`. `within`: "sentence" where none of
    them is of an earlier sentence than its own.
    """

    method: str
    window: int
    least: int | None = None
    within: str | None = None

    @staticmethod
    def positions_of(pool: PoolSpec | None) -> int:
        """How many activations a row keeps, at most."""
        return pool.window if pool is not None and pool.method == "stack" else 1

    @staticmethod
    def bounds_of(pool: PoolSpec | None) -> tuple[int, int] | None:
        """(least, most) activations of a row where the number differs from row to row; None where it does not."""
        return None if pool is None or pool.least is None else (pool.least, pool.window)


@dataclass(frozen=True)
class BaselineSpec:
    """`baseline`, our extension: the mean of the training rows, which FVE compares with (`contract.baseline`).

    `rows`: how many rows it is of, all of the build that are not held out. `scale`: at which each entered. `sha256`: of
    the file beside the table.
    """

    rows: int
    scale: float | str | None
    sha256: str


@dataclass(frozen=True)
class ReconstructorSpec:
    """`reconstructor`, our extension: how an AR makes a vector of its stream (`models.heads`).

    `layer`: the block that it reads, its last one; None is K, the block of the activations.
    """

    pooling: str = "last"
    projection_layers: int = 1
    dropout: float = 0.0
    layer: int | None = None

    def is_plain(self, layer_index: int | None) -> bool:
        """Whether it is the AR that every trainer means: a matrix on the last token's stream behind block K."""
        return self.pooling == "last" and self.projection_layers == 1 and self.layer in (None, layer_index)

    def same_parameters(self, other: ReconstructorSpec) -> bool:
        """Whether weights of the one are weights of the other: all but the dropout agrees."""
        return (self.pooling, self.projection_layers, self.layer) == (
            other.pooling, other.projection_layers, other.layer,
        )  # fmt: skip


def read_block(cls: type[Block], raw: object, where: str, source: str) -> Block:
    """Build a block from a YAML mapping, strictly.

    Args:
        cls: one of the dataclasses of this file, or a whole sidecar.
        raw: what YAML gave.
        where: the key the block stands at, such as `"extraction"`; empty at the top level, where unknown keys are other
            people's extensions and pass.
        source: the file, for the message.

    Raises:
        SidecarError: not a mapping, an unknown or missing key, or a value of another type, with its full key.
    """
    if not isinstance(raw, Mapping):
        raise SidecarError(f"{where!r} in {source!r} is {raw!r}", "a mapping", _REMEDY)
    assert is_dataclass(cls)
    prefix = f"{where}." if where else ""
    known = {field.name: field for field in fields(cls)}
    unknown = [key for key in raw if key not in known]
    if where and unknown:
        raise SidecarError(f"unknown key '{prefix}{unknown[0]}' in {source!r}", f"only {', '.join(known)}", _REMEDY)
    hints = get_type_hints(cls)
    values = {}
    for name, field in known.items():
        if name in raw:
            values[name] = _convert(hints[name], raw[name], prefix + name, source)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise SidecarError(f"no key '{prefix}{name}' in {source!r}", f"the keys {', '.join(known)}", _REMEDY)
    return cls(**values)


def _convert(hint: Any, value: object, where: str, source: str) -> Any:
    """`value` as the annotated type: lists become tuples, mappings become blocks; anything else must already fit."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        if is_dataclass(option) and isinstance(option, type):
            if value is not None:
                return read_block(option, value, where, source)
        elif get_origin(option) is tuple:
            if isinstance(value, list):
                item = get_args(option)[0]
                return tuple(_convert(item, one, f"{where}[{i}]", source) for i, one in enumerate(value))
        else:
            plain = (int, float) if option is float else get_origin(option) or option
            if isinstance(value, plain) and (option is bool or not isinstance(value, bool)):
                return value
    wanted = " or ".join("null" if one is type(None) else getattr(one, "__name__", str(one)) for one in options)
    raise SidecarError(f"{where!r} in {source!r} is {value!r}", f"a value of type {wanted}", _REMEDY)


def as_yaml_block(block: Any) -> dict[str, Any]:
    """A block as plain YAML values: tuples become lists, nested blocks mappings."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(one) for key, one in value.items()}
        return [plain(one) for one in value] if isinstance(value, list | tuple) else value

    result = plain(asdict(block))
    assert isinstance(result, dict)
    return result
