"""One safetensors file: what a damaged one is told of, and that others read what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nla_megatron.conversion.safetensors_file import (
    Shard,
    ShardFile,
    TensorSpec,
    checksum,
    index_of,
    mapped,
    plan_shards,
    read_header,
)
from nla_megatron.errors import CheckpointError

TENSORS = {
    "matrix": torch.arange(6.0).reshape(2, 3),
    "odd": torch.tensor([1.5, -2.0, 3.0], dtype=torch.bfloat16),
    "scalar": torch.tensor(7.0),
    "empty": torch.empty(0, 4),
    "ids": torch.arange(5),
}


def specs() -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "one.safetensors"
    save_file(TENSORS, path)
    return path


def rewritten(path: Path, **entry: object) -> Path:
    """The file with its header's entry for `matrix` changed."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["matrix"].update(entry)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    return path


def test_every_tensor_of_a_foreign_file_is_mapped_as_it_is(saved: Path) -> None:
    found = {name: mapped(saved, one.start, one.spec) for name, one in read_header(saved).items()}
    assert found.keys() == TENSORS.keys()
    assert all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in TENSORS.items()
    )


def test_writing_to_a_map_leaves_the_file_alone(saved: Path) -> None:
    before = saved.read_bytes()
    one = read_header(saved)["matrix"]
    mapped(saved, one.start, one.spec).fill_(9)
    assert saved.read_bytes() == before


@pytest.mark.parametrize("kept", [4, 8, 40, -1])
def test_a_file_that_is_cut_short_is_refused(saved: Path, kept: int) -> None:
    saved.write_bytes(saved.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"one\.safetensors"):
        read_header(saved)


def test_a_file_with_more_than_its_header_says_is_refused(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        read_header(saved)


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"dtype": "Q4"}, "dtype Q4"),
        ({"shape": [2, 4]}, r"24 bytes for matrix \(2, 4\)"),
        ({"data_offsets": [4, 28]}, "behind its neighbour"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(saved: Path, entry: dict[str, object], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        read_header(rewritten(saved, **entry))


def test_safetensors_reads_a_shard_that_was_written_in_any_order(tmp_path: Path) -> None:
    shard = Shard("s.safetensors", specs())
    file = ShardFile(tmp_path, shard)
    sums = {name: file.write(name, TENSORS[name]) for name in reversed(TENSORS)}
    assert file.missing() == []
    file.close()
    found = load_file(tmp_path / "s.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert sums == {name: checksum(tensor) for name, tensor in TENSORS.items()}
    with safe_open(tmp_path / "s.safetensors", "pt") as handle:
        assert handle.metadata() == {"format": "pt"}
    assert (tmp_path / "s.safetensors").stat().st_size == shard.nbytes


def test_a_tensor_other_than_the_planned_one_is_refused(tmp_path: Path) -> None:
    file = ShardFile(tmp_path, Shard("s.safetensors", specs()))
    with pytest.raises(AssertionError, match="matrix"):
        file.write("matrix", torch.zeros(3, 2))
    with pytest.raises(AssertionError, match="ids"):
        file.write("ids", torch.zeros(5))
    assert len(file.missing()) == 3
    file.close()


def test_a_checksum_is_of_the_values_in_their_order(tmp_path: Path) -> None:
    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert checksum(base.T) == checksum(base.T.contiguous()) != checksum(base)
    changed = base.clone()
    changed[3, 5] = torch.nextafter(changed[3, 5], torch.tensor(torch.inf))
    assert checksum(changed) != checksum(base)


def test_shards_hold_what_fits_in_order() -> None:
    many = [TensorSpec(str(number), torch.float32, (size,)) for number, size in enumerate((10, 10, 30, 5, 5))]
    shards = plan_shards(many, 80)
    assert [[spec.name for spec in shard.specs] for shard in shards] == [["0", "1"], ["2"], ["3", "4"]]
    assert [shard.file for shard in shards] == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert index_of(shards)["metadata"] == {"total_parameters": 60, "total_size": 240}
    assert [shard.file for shard in plan_shards(many, 240)] == ["model.safetensors"]
