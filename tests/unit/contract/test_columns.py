from __future__ import annotations

import pyarrow as pa
import pytest

from nla_megatron.contract import columns
from nla_megatron.errors import ColumnError

PROVENANCE = {"n_raw_tokens", "detokenized_text_truncated", "activation_layer", "doc_id", "activation_vector"}


@pytest.mark.parametrize(
    ("stage", "extra"),
    [
        ("base", set()),
        ("explained", {"api_explanation"}),
        ("av_sft", {"prompt", "response", "api_explanation"}),
        ("ar_sft", {"prompt"}),
        ("rl", {"prompt", "api_explanation"}),
    ],
)
def test_every_stage_carries_provenance_and_its_own_columns(stage: str, extra: set[str]) -> None:
    assert set(columns.schema(stage, 4).names) == PROVENANCE | extra


@pytest.mark.parametrize("stage", columns.STAGES)
def test_a_written_schema_passes_its_own_check_and_gives_the_width(stage: str) -> None:
    assert columns.check_columns(columns.schema(stage, 48), stage, "t.parquet") == 48


def test_the_prompt_is_messages_for_the_av_and_text_for_the_ar() -> None:
    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    assert columns.schema("av_sft", 4).field("prompt").type == messages
    assert columns.schema("rl", 4).field("prompt").type == messages
    assert columns.schema("ar_sft", 4).field("prompt").type == pa.string()


@pytest.mark.parametrize("stage", columns.STAGES)
def test_a_missing_required_column_is_named(stage: str) -> None:
    full = columns.schema(stage, 4)
    optional = {"av_sft": {"detokenized_text_truncated", "api_explanation"}, "ar_sft": {"detokenized_text_truncated"}}
    optional["rl"] = optional["av_sft"]
    for name in full.names:
        reduced = full.remove(full.get_field_index(name))
        if name in optional.get(stage, set()):
            assert columns.check_columns(reduced, stage, "t.parquet") == 4
        else:
            with pytest.raises(ColumnError, match=f"no column '{name}' in 't.parquet'"):
                columns.check_columns(reduced, stage, "t.parquet")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("activation_vector", pa.list_(pa.float32())),
        ("activation_vector", pa.list_(pa.float64(), 4)),
        ("n_raw_tokens", pa.float64()),
        ("doc_id", pa.int64()),
        ("prompt", pa.string()),
        ("prompt", pa.list_(pa.struct([("role", pa.string())]))),
        ("api_explanation", pa.int64()),  # optional here, but not of any type
    ],
)
def test_a_wrong_type_is_named_with_the_type_found(name: str, wrong: pa.DataType) -> None:
    full = columns.schema("rl", 4)
    found = full.set(full.get_field_index(name), pa.field(name, wrong))
    with pytest.raises(ColumnError, match=f"column '{name}' in 't.parquet' has type") as caught:
        columns.check_columns(found, "rl", "t.parquet")
    assert str(wrong) in caught.value.found


def test_extra_columns_and_large_strings_pass() -> None:
    found = columns.schema("base", 4)
    found = found.set(found.get_field_index("doc_id"), pa.field("doc_id", pa.large_string()))
    assert columns.check_columns(found.append(pa.field("note", pa.int8())), "base", "t.parquet") == 4


def test_an_unknown_stage_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="unknown stage 'sft'"):
        columns.schema("sft", 4)


@pytest.mark.parametrize("stage", columns.STAGES)
def test_a_schema_of_several_positions_gives_their_number(stage: str) -> None:
    written = columns.schema(stage, 4, positions=3)
    assert columns.check_columns(written, stage, "t.parquet") == 4
    assert written.field("preceding_vectors").type == pa.list_(pa.float32(), 8)
    assert columns.positions_of(written, 4, "t.parquet") == 3
    assert columns.positions_of(columns.schema(stage, 4), 4, "t.parquet") == 1
    assert "preceding_vectors" not in columns.schema(stage, 4).names


@pytest.mark.parametrize(
    "wrong",
    [pa.list_(pa.float32(), 6), pa.list_(pa.float32(), 0), pa.list_(pa.float64(), 8), pa.list_(pa.float64())],
    ids=str,
)
def test_preceding_vectors_that_are_not_whole_vectors_are_named(wrong: pa.DataType) -> None:
    found = columns.schema("rl", 4).append(pa.field("preceding_vectors", wrong))
    with pytest.raises(ColumnError, match=r"column 'preceding_vectors' in 't.parquet' has type") as caught:
        columns.positions_of(found, 4, "t.parquet")
    assert str(wrong) in caught.value.found and "width 4" in caught.value.expected


@pytest.mark.parametrize("stage", columns.STAGES)
def test_a_schema_of_any_number_of_positions_says_that_rows_differ(stage: str) -> None:
    written = columns.schema(stage, 4, positions=None)
    assert written.field("preceding_vectors").type == pa.large_list(pa.float32())
    assert columns.check_columns(written, stage, "t.parquet") == 4
    assert columns.positions_of(written, 4, "t.parquet") is None


def test_no_positions_are_a_programming_error() -> None:
    with pytest.raises(ValueError, match="positions must be at least 1"):
        columns.schema("rl", 4, positions=0)
