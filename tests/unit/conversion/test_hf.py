"""Hugging Face directories: shards with their index, slices, companions, and what is missing said by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nla_megatron.conversion.families import rules_of
from nla_megatron.conversion.hf import (
    INDEX,
    SafetensorsReader,
    copy_companions,
    read_config,
    read_shape,
    read_value_head,
    truncated_config,
    write_shards,
    write_value_head,
)
from nla_megatron.errors import CheckpointError, MissingFile
from tests.support.tiny import SHAPE, tiny_model

TENSORS = {name: torch.arange(start, start + 12.0).reshape(4, 3) for start, name in enumerate(("a", "b", "c", "d"))}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two tensors of 48 bytes to a shard."""
    write_shards(tmp_path, TENSORS.items(), shard_bytes=100)
    return tmp_path


def test_shards_hold_what_fits_and_the_index_says_where(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    first, second = "model-00001.safetensors", "model-00002.safetensors"
    assert index["weight_map"] == {"a": first, "b": first, "c": second, "d": second}
    assert index["metadata"]["total_size"] == 4 * 48
    assert sorted(path.name for path in sharded.iterdir()) == [first, second, INDEX]


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own(tmp_path: Path) -> None:
    write_shards(tmp_path, TENSORS.items(), shard_bytes=1)
    assert len(set(json.loads((tmp_path / INDEX).read_text())["weight_map"].values())) == 4


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    write_shards(tmp_path, TENSORS.items())
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert SafetensorsReader(tmp_path).names() == set(TENSORS)


def test_what_is_written_is_read_in_slices_of_either_axis(sharded: Path) -> None:
    reader = SafetensorsReader(sharded)
    assert reader.names() == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert reader.shape(name) == (4, 3)
        assert torch.equal(reader.read(name, 0, 1, 3), tensor[1:3])
        assert torch.equal(reader.read(name, 1, 1, 3), tensor[:, 1:3])
        assert reader.read(name, 0, 4, 4).shape == (0, 3)


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    write_shards(tmp_path, [("t", base.T), ("half", base[:, ::2].bfloat16())])
    reader = SafetensorsReader(tmp_path)
    assert torch.equal(reader.read("t", 0, 0, 6), base.T)
    assert torch.equal(reader.read("half", 0, 0, 4), base[:, ::2].bfloat16())


def test_several_files_without_an_index_are_searched(tmp_path: Path) -> None:
    write_shards(tmp_path, list(TENSORS.items())[:2])
    (tmp_path / "model.safetensors").rename(tmp_path / "one.safetensors")
    write_shards(tmp_path, list(TENSORS.items())[2:])
    write_value_head(tmp_path, torch.eye(3))
    assert SafetensorsReader(tmp_path).names() == set(TENSORS), "the value head is no weight of the model"


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002.safetensors").unlink()
    reader = SafetensorsReader(sharded)
    assert reader.shape("a") == (4, 3)
    with pytest.raises(MissingFile, match="model-00002.safetensors"):
        reader.read("c", 0, 0, 1)


def test_a_missing_tensor_is_named(sharded: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensor 'nobody'"):
        SafetensorsReader(sharded).shape("nobody")


def test_a_directory_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"no \*.safetensors in"):
        SafetensorsReader(tmp_path)


@pytest.mark.parametrize("read", [read_config, read_shape])
def test_a_missing_config_is_named(tmp_path: Path, read: object) -> None:
    assert callable(read)
    with pytest.raises(MissingFile, match="config.json"):
        read(tmp_path / "nowhere")


def test_the_value_head_comes_back_in_fp32(tmp_path: Path) -> None:
    assert read_value_head(tmp_path) is None
    head = torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    write_value_head(tmp_path, head)
    found = read_value_head(tmp_path)
    assert found is not None and found.dtype == torch.float32 and torch.equal(found, head.float())


def test_a_truncated_config_cuts_every_list_of_layers_and_nothing_else() -> None:
    config = {
        "architectures": ["A", "B", "C", "D"],
        "num_hidden_layers": 4,
        "layer_types": ["full", "sliding", "full", "sliding"],
        "no_rope_layers": [0, 1, 0, 1],
        "max_window_layers": 4,
        "eos_token_id": [1, 2, 3, 4],
        "other": [1, 2],
    }
    cut = truncated_config(config, 3)
    assert cut == {
        **config,
        "num_hidden_layers": 3,
        "layer_types": ["full", "sliding", "full"],
        "no_rope_layers": [0, 1, 0],
        "max_window_layers": 3,
    }
    assert config["num_hidden_layers"] == 4, "the original is left as it was"


def test_companions_are_copied_and_weights_are_not(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "merges.txt",
        "generation_config.json",
        INDEX,
        "a.safetensors",
    ):
        (source / name).write_text(name)
    (source / "config.json").write_text("{}")
    copy_companions(source, target, {"hidden_size": 8, "torch_dtype": "float16", "dtype": "float32"}, torch.bfloat16)
    assert sorted(path.name for path in target.iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", "merges.txt", "tokenizer.json",
    ]  # fmt: skip
    assert read_config(target) == {"hidden_size": 8, "dtype": "bfloat16"}


def test_a_model_that_transformers_wrote_is_read_whole(tmp_path: Path) -> None:
    reader, shape = SafetensorsReader(tiny_model(tmp_path)), read_shape(tmp_path)
    assert shape == SHAPE
    expected = {part.hf: rule.hf_shape(part) for rule in rules_of(shape, with_head=True) for part in rule.parts}
    assert reader.names() == set(expected)
    assert {name: reader.shape(name) for name in expected} == expected


def test_the_tiny_model_is_the_same_every_time(tmp_path: Path) -> None:
    name = "model.layers.3.mlp.up_proj.weight"
    one, other = (SafetensorsReader(tiny_model(tmp_path / folder)).read(name, 0, 0, 96) for folder in "ab")
    assert torch.equal(one, other) and one.std() > 0
