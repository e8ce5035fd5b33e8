"""Hugging Face directories: shards with their index, slices, companions, and what is missing said by name."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nla_megatron.conversion.families import rules_of
from nla_megatron.conversion.hf import (
    INDEX,
    VALUE_HEAD,
    SafetensorsReader,
    check_vocabulary,
    copy_companions,
    read_config,
    read_shape,
    read_value_head,
    truncated_config,
    write_shards,
    write_value_head,
)
from nla_megatron.conversion.safetensors_file import TensorSpec
from nla_megatron.errors import CheckpointError, MissingFile
from tests.support.tiny import SHAPE, tiny_config, tiny_model

TENSORS = {name: torch.arange(start, start + 12.0).reshape(4, 3) for start, name in enumerate(("a", "b", "c", "d"))}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two tensors of 48 bytes to a shard."""
    write_shards(tmp_path, TENSORS.items(), shard_bytes=100)
    return tmp_path


def test_shards_hold_what_fits_and_the_index_says_where(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert index["weight_map"] == {"a": first, "b": first, "c": second, "d": second}
    assert index["metadata"]["total_size"] == 4 * 48
    assert sorted(path.name for path in sharded.iterdir()) == [first, second, INDEX]


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own(tmp_path: Path) -> None:
    write_shards(tmp_path, TENSORS.items(), shard_bytes=1)
    assert len(set(json.loads((tmp_path / INDEX).read_text())["weight_map"].values())) == 4


def test_shards_and_index_are_those_of_transformers(tmp_path: Path) -> None:
    """The same names, the same index, the same tensors in each file, for the same order of tensors."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    model = Qwen3ForCausalLM(Qwen3Config(**read_config(tiny_config(tmp_path / "config", tied_embeddings=False))))
    model.save_pretrained(theirs, max_shard_size="300KB")
    write_shards(ours, model.state_dict().items(), shard_bytes=300_000)
    files = sorted(path.name for path in theirs.iterdir() if "safetensors" in path.name)
    assert sorted(path.name for path in ours.iterdir()) == files and len(files) > 3
    assert json.loads((ours / INDEX).read_text()) == json.loads((theirs / INDEX).read_text())
    loaded = Qwen3ForCausalLM.from_pretrained(copy_of_config(theirs, ours)).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def copy_of_config(source: Path, target: Path) -> Path:
    shutil.copyfile(source / "config.json", target / "config.json")
    return target


def test_with_the_plan_given_one_tensor_at_a_time_is_taken(tmp_path: Path) -> None:
    taken: list[str] = []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in TENSORS.items():
            written = sum(path.stat().st_size for path in tmp_path.iterdir())
            assert written or not taken, "the first tensor is on its way when the second is asked for"
            taken.append(name)
            yield name, tensor

    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()]
    write_shards(tmp_path, tensors(), 50, specs)
    assert SafetensorsReader(tmp_path).names() == set(taken) == set(TENSORS)


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
    (tmp_path / "model.safetensors").rename(tmp_path / "two.safetensors")
    write_value_head(tmp_path, torch.eye(3))
    assert SafetensorsReader(tmp_path).names() == set(TENSORS), "the value head is no weight of the model"


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(MissingFile, match="model-00002-of-00002.safetensors"):
        SafetensorsReader(sharded)


def changed_index(directory: Path, **file_of: str | None) -> None:
    index = json.loads((directory / INDEX).read_text())
    for name, file in file_of.items():
        index["weight_map"].pop(name, None)
        index["weight_map"] |= {} if file is None else {name: file}
    (directory / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["a", "nobody"])
def test_an_index_that_names_a_file_without_the_tensor_is_refused(sharded: Path, name: str) -> None:
    changed_index(sharded, **{name: "model-00002-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match=f"'{name}' in model-00002"):
        SafetensorsReader(sharded)


def test_a_tensor_that_the_index_does_not_name_is_refused(sharded: Path) -> None:
    changed_index(sharded, d=None)
    with pytest.raises(CheckpointError, match="does not name, first 'd'"):
        SafetensorsReader(sharded)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, TENSORS.items())
    (tmp_path / "model.safetensors").rename(tmp_path / "one.safetensors")
    shutil.copyfile(tmp_path / "one.safetensors", tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="each tensor once"):
        SafetensorsReader(tmp_path)


def tokenizer_of(directory: Path, vocabulary: object, *added: tuple[int, str], **config: object) -> Path:
    tokens = [{"id": number, "content": content} for number, content in added]
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": tokens}))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(
    ("vocabulary", "added", "config", "largest"),
    [
        ({"a": 0, "b": 9}, [], {}, 9),
        ([["a", 0.0], ["b", -1.0]], [], {}, 1),
        ({"a": 0}, [(12, "<x>")], {}, 12),
        ({"a": 3}, [(12, "<image>")], {"image_token": "<image>"}, 3),
        ({"a": 3}, [(12, "<image>")], {"extra_special_tokens": {"image_token": "<image>"}}, 3),
        ({"a": 3}, [(12, "<image>")], {"extra_special_tokens": ["<image>"]}, 12),
    ],
)
def test_a_tokenizer_with_ids_beyond_the_vocabulary_is_refused(
    tmp_path: Path, vocabulary: object, added: list[tuple[int, str]], config: dict[str, object], largest: int
) -> None:
    directory = tokenizer_of(tmp_path, vocabulary, *added, **config)
    check_vocabulary(directory, largest + 1)
    with pytest.raises(CheckpointError, match=f"token id {largest} "):
        check_vocabulary(directory, largest)


@pytest.mark.parametrize("file", ["vocab.json", "added_tokens.json"])
def test_a_tokenizer_of_the_older_form_is_held_against_the_vocabulary_too(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text(json.dumps({"a": 1, "b": 7}))
    check_vocabulary(tmp_path, 8)
    with pytest.raises(CheckpointError, match=f"token id 7 in .*{file}"):
        check_vocabulary(tmp_path, 7)


def test_a_tokenizer_without_tokens_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="without tokens"):
        check_vocabulary(tmp_path, 7)


def test_a_directory_without_a_tokenizer_has_none_that_is_too_large(tmp_path: Path) -> None:
    check_vocabulary(tmp_path, 1)


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


def test_a_value_head_is_a_file_of_its_own(tmp_path: Path) -> None:
    """What is written to one directory changes no other, whose file it was by a hard link."""
    write_value_head(tmp_path, torch.eye(3))
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / VALUE_HEAD).hardlink_to(tmp_path / VALUE_HEAD)
    write_value_head(tmp_path / "copy", torch.zeros(3, 3))
    found = read_value_head(tmp_path)
    assert found is not None and torch.equal(found, torch.eye(3))


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


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "0 bytes"),
        (gzip.compress(b"{}", mtime=0), "gzip"),
        (b"\x02" + bytes(7) + b"{}", "tensors none"),
        (b"PAR1" + bytes(40), "parquet"),
    ],
)
def test_a_head_that_is_none_is_named(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / VALUE_HEAD).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{VALUE_HEAD}.*{told}"):
        read_value_head(tmp_path)
