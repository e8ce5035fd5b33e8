"""Column names and types of every table, in one place.

The names are shared with other NLA trainers, so a table written here is read there and the other way round.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nla_megatron.errors import ColumnError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pyarrow as pa

N_RAW_TOKENS = "n_raw_tokens"  # position of the activation + 1
TEXT = "detokenized_text_truncated"  # the text up to and including that position
VECTOR = "activation_vector"  # raw float32, never normalised in a file
PRECEDING = "preceding_vectors"  # of the positions before it, oldest first, side by side; only where several are kept
LAYER = "activation_layer"  # block index K
DOC_ID = "doc_id"  # "{corpus}:{split}:{index}"
EXPLANATION = "api_explanation"
PROMPT = "prompt"
RESPONSE = "response"

STAGES = ("base", "explained", "av_sft", "ar_sft", "rl")

_PROVENANCE = (N_RAW_TOKENS, TEXT, LAYER, DOC_ID, VECTOR)
_COLUMNS = {
    "base": _PROVENANCE,
    "explained": (*_PROVENANCE, EXPLANATION),
    "av_sft": (PROMPT, RESPONSE, *_PROVENANCE, EXPLANATION),
    "ar_sft": (PROMPT, *_PROVENANCE),
    "rl": (PROMPT, *_PROVENANCE, EXPLANATION),
}
# Tables of other trainers carry no gold text in these stages and may leave the source text out to save space.
_OPTIONAL = {"av_sft": {TEXT, EXPLANATION}, "ar_sft": {TEXT}, "rl": {TEXT, EXPLANATION}}


def schema(stage: str, d_model: int, positions: int | None = 1) -> pa.Schema:
    """The schema of the table that `stage` writes, with vectors of `d_model` float32.

    Args:
        stage: `base`, `explained`, `av_sft`, `ar_sft` or `rl`.
        d_model: the hidden size of the model the vectors come from.
        positions: how many activations a row keeps; all but its own are in `preceding_vectors`. None: each row a number
            of its own.

    Raises:
        ValueError: an unknown stage, or a width or number of positions below 1.
    """
    import pyarrow as pa

    if d_model < 1 or (positions is not None and positions < 1):
        raise ValueError(f"d_model and positions must be at least 1, got {d_model} and {positions}")
    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    types = {
        N_RAW_TOKENS: pa.int64(),
        LAYER: pa.int64(),
        VECTOR: pa.list_(pa.float32(), d_model),
        PROMPT: pa.string() if stage == "ar_sft" else messages,
    }
    fields = [(name, types.get(name, pa.string())) for name in _columns(stage)]
    if positions is None:
        fields.append((PRECEDING, pa.large_list(pa.float32())))
    elif positions > 1:
        fields.append((PRECEDING, pa.list_(pa.float32(), (positions - 1) * d_model)))
    return pa.schema(fields)


def check_columns(found: pa.Schema, stage: str, path: Path | str) -> int:
    """Compare a table's schema with the contract and return the width of its vectors.

    Other columns than the contract's are allowed. In the training stages `detokenized_text_truncated` and
    `api_explanation` may be absent (tables of other trainers); when present their types are checked.

    Args:
        found: the schema read from the file.
        stage: the stage the table should be of.
        path: where the schema was read, for the message.

    Raises:
        ColumnError: a column is missing or has another type.
    """
    for name in _columns(stage):
        if name not in found.names:
            if name in _OPTIONAL.get(stage, set()):
                continue
            raise ColumnError(
                f"no column {name!r} in {str(path)!r}; it has {', '.join(found.names) or 'none'}",
                f"the columns of a {stage!r} table: {', '.join(_columns(stage))}",
                f"give the table that the {stage!r} stage writes, or write it again",
            )
        expected, fits = _rule(name, stage)
        if not fits(found.field(name).type):
            raise ColumnError(
                f"column {name!r} in {str(path)!r} has type {found.field(name).type}",
                f"{expected} in a {stage!r} table",
                "write the table again with this type, or give the table of the right stage",
            )
    return int(found.field(VECTOR).type.list_size)


def positions_of(found: pa.Schema, d_model: int, path: Path | str) -> int | None:
    """How many activations a row of width `d_model` keeps: 1 without `preceding_vectors`.

    None where that column holds lists: each row keeps a number of its own, which its list's length says.

    Raises:
        ColumnError: that column does not hold whole vectors side by side.
    """
    import pyarrow.types as pt

    if PRECEDING not in found.names:
        return 1
    kind, (expected, fits) = found.field(PRECEDING).type, _rule(VECTOR, "base")
    if (pt.is_list(kind) or pt.is_large_list(kind)) and pt.is_float32(kind.value_type):
        return None
    if not fits(kind) or kind.list_size == 0 or kind.list_size % d_model:
        raise ColumnError(
            f"column {PRECEDING!r} in {str(path)!r} has type {kind}",
            f"{expected}, as long as one or more vectors of width {d_model}",
            "write the table again with this type, or without this column",
        )
    return 1 + int(kind.list_size) // d_model


def required(stage: str) -> tuple[str, ...]:
    """The columns that a table of a stage cannot do without."""
    return tuple(name for name in _columns(stage) if name not in _OPTIONAL.get(stage, set()))


def _columns(stage: str) -> tuple[str, ...]:
    if stage not in _COLUMNS:
        raise ValueError(f"unknown stage {stage!r}; the stages are {', '.join(STAGES)}")
    return _COLUMNS[stage]


def _rule(name: str, stage: str) -> tuple[str, Callable[[pa.DataType], bool]]:
    """What a column must be, in words and as a test of its Arrow type."""
    import pyarrow.types as pt

    if name == VECTOR:
        return "fixed_size_list<float32>", lambda t: pt.is_fixed_size_list(t) and pt.is_float32(t.value_type)
    if name in (N_RAW_TOKENS, LAYER):
        return "int64", pt.is_int64
    if name == PROMPT and stage != "ar_sft":
        return "list<struct<role: string, content: string>>", _is_messages
    return "string", _is_text


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow.types as pt

    return bool(pt.is_string(kind) or pt.is_large_string(kind))


def _is_messages(kind: pa.DataType) -> bool:
    import pyarrow.types as pt

    if not (pt.is_list(kind) or pt.is_large_list(kind)) or not pt.is_struct(kind.value_type):
        return False
    fields = {field.name: field.type for field in kind.value_type}
    return all(name in fields and _is_text(fields[name]) for name in ("role", "content"))
